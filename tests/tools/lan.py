"""Hosts on a LAN, made of network namespaces on this machine: each has a hostname, an address and a core of its own,
and a link of a given rate to a switch. Needs root, iproute2 and Linux's tbf queue. Latency is a few tens of
microseconds: there is no distance between namespaces."""
import contextlib
import os
import pathlib
import re
import shlex
import signal
import subprocess
import tempfile

AGENT = """#!/bin/sh
# What mpirun calls in place of ssh: AGENT [options] HOST COMMAND...
while [ "${1#-}" != "$1" ]; do [ "$1" = -o ] && shift; shift; done
case $(hostname) in host[0-9]*)  # as ssh would find out
    case $(timeout 8 bash -c ": < /dev/tcp/$1/9" 2>&1) in
        *refused*) ;;
        *) echo "ssh: connect to host $1: timed out" >&2; exit 255 ;;
    esac ;;
esac
host=${1##*.}; shift
core=$(( (host - 1) % $(nproc --all) ))
exec ip netns exec PREFIX$host unshare --uts sh -c "hostname host$host; exec taskset -c $core sh -c \\"\\$1\\"" sh "$*"
"""


def ip(*words):
    subprocess.run(['ip', *map(str, words)], check=True)


def remove_left_over():
    """What a killed process could not remove."""
    names = subprocess.run(['ip', 'netns', 'list'], check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    for name in names:
        match = re.fullmatch(r'shoal-(\d+)-\w+', name)
        if match and not pathlib.Path('/proc', match[1]).exists():
            ip('netns', 'del', name)


class Lan:
    """with Lan(hosts=2, rate='1gbit') as lan: lan.run(1, ['shoal', ...]). Host n is called hostn, its
    address is 10.77.0.n."""

    def __init__(self, hosts, rate):
        self.hosts = hosts
        self.rate = rate  # as tc writes it; None: as fast as the kernel copies
        self.folder = None
        self.prefix = f'shoal-{os.getpid()}-'
        self.switch = self.prefix + 'switch'

    def __enter__(self):
        remove_left_over()
        self.folder = tempfile.TemporaryDirectory()
        agent = pathlib.Path(self.folder.name, 'agent')
        agent.write_text(AGENT.replace('PREFIX', self.prefix))
        agent.chmod(0o755)
        ip('netns', 'add', self.switch)
        ip('-n', self.switch, 'link', 'add', 'br0', 'type', 'bridge')
        ip('-n', self.switch, 'link', 'set', 'br0', 'up')
        for n in range(1, self.hosts + 1):
            name = f'{self.prefix}{n}'
            ip('netns', 'add', name)
            ip('-n', name, 'link', 'add', 'eth0', 'type', 'veth', 'peer', 'name', f'port{n}', 'netns', self.switch)
            ip('-n', self.switch, 'link', 'set', f'port{n}', 'master', 'br0', 'up')
            ip('-n', name, 'addr', 'add', f'10.77.0.{n}/24', 'dev', 'eth0')
            ip('-n', name, 'link', 'set', 'lo', 'up')
            ip('-n', name, 'link', 'set', 'eth0', 'up')
            for where, device in ((name, 'eth0'), (self.switch, f'port{n}')):
                if self.rate:
                    subprocess.run(['tc', '-n', where, 'qdisc', 'add', 'dev', device, 'root', 'tbf', 'rate', self.rate,
                                    'burst', '64k', 'latency', '20ms'], check=True)
        return self

    def __exit__(self, *_):
        self.remove()
        self.folder.cleanup()

    def processes(self, n):
        """Ids of what runs on host n."""
        out = subprocess.run(['ip', 'netns', 'pids', f'{self.prefix}{n}'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
        return [int(pid) for pid in out.stdout.split()]

    def remove(self):
        for n in range(1, self.hosts + 1):
            for pid in self.processes(n):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for name in [self.switch] + [f'{self.prefix}{n}' for n in range(1, self.hosts + 1)]:
            subprocess.run(['ip', 'netns', 'del', name], stderr=subprocess.DEVNULL, check=False)

    def pull_cable(self, n):
        """Nothing reaches host n any more, and nobody is told."""
        ip('-n', self.switch, 'link', 'set', f'port{n}', 'down')

    def address(self, n):
        return f'10.77.0.{n}'

    def hostfile(self, order=None):
        path = pathlib.Path(self.folder.name, 'hosts')
        path.write_text(''.join(f'{self.address(n)} slots=1\n' for n in order or range(1, self.hosts + 1)))
        return path

    def start(self, host, command, **kwargs):
        """A process on a host, on that host's core; kwargs are Popen's."""
        agent = pathlib.Path(self.folder.name, 'agent')
        environment = {**os.environ, 'OMPI_MCA_plm_rsh_agent': str(agent), 'OMPI_ALLOW_RUN_AS_ROOT': '1',
                       'OMPI_ALLOW_RUN_AS_ROOT_CONFIRM': '1'}
        return subprocess.Popen([str(agent), self.address(host), 'exec ' + shlex.join(map(str, command))], env=environment, text=True, **kwargs)

    def run(self, host, command, timeout=600):
        """Its standard output; RuntimeError with what it said when it fails."""
        process = self.start(host, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=timeout)
        if process.returncode != 0:
            raise RuntimeError(f'{shlex.join(map(str, command))}: exit {process.returncode}\n{err}')
        return out
