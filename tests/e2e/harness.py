"""What the end-to-end tests share: finding the binary, running it with a deadline, and its models.

Each test file is one concern, written with unittest, run by CTest from the project's root with SHOAL_BINARY set.
"""
import dataclasses
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SHARED_DATA = ROOT.parent / 'shared' / 'data'
BINARY = os.environ.get('SHOAL_BINARY', str(ROOT / 'build' / 'shoal'))
DEMO_MODEL = ROOT / 'deploy' / 'demo_model' / 'demo-q8_0.gguf'
STORIES = SHARED_DATA / 'stories260K' / 'stories260K-f32.gguf'
SKIPPED = 77  # CTest shows it as "Skipped", so that a missing folder cannot look like a passed test

# Exit codes of the binary; DESIGN.md and README.md name them.
OK, USAGE, TOO_BIG, MALFORMED, UNREADABLE, UNAVAILABLE, INTERNAL, CONFIG = 0, 2, 3, 65, 66, 69, 70, 78


@dataclasses.dataclass
class Result:
    code: int
    out: bytes
    err: str
    seconds: float

    def __str__(self):
        return f'exit {self.code} after {self.seconds:.1f} s\nstdout: {self.out[:2000]!r}\nstderr: {self.err[-4000:]}'


def run(*args, timeout=120, env=None, cwd=ROOT):
    """Runs a command without stdin in a session of its own; everything it started is killed when it overruns."""
    start = time.monotonic()
    process = subprocess.Popen([str(a) for a in args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, cwd=cwd, env={**os.environ, **(env or {})},
                               start_new_session=True)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for pid in descendants(process.pid) + [process.pid]:
            kill(pid)
        out, err = process.communicate()
        raise AssertionError(f'{args} still ran after {timeout} s\n{out[-2000:]!r}\n{err[-2000:]!r}') from None
    return Result(process.returncode, out, err.decode(errors='replace'), time.monotonic() - start)


def shoal(*args, **kwargs):
    return run(BINARY, *args, **kwargs)


def mpirun(ranks, *args, **kwargs):
    """The binary as `ranks` processes; CTest sets the OMPI_* variables for root and more ranks than cores."""
    return run('mpirun', '-np', ranks, BINARY, *args, **kwargs)


def generate(path, *flags):
    """A model with random weights, see tests/tools/make_gguf.py."""
    subprocess.run([sys.executable, str(ROOT / 'tests' / 'tools' / 'make_gguf.py'), str(path), *map(str, flags)],
                   check=True)
    return path


_reservations = []  # sockets that live as long as this process


def reserve_ports(count):
    """The first of `count` ports in a row for a server that cannot be told to choose one itself (port 0).

    They are below the range that the kernel hands out, and an abstract socket keeps each from every other test on this host
    until this process ends, so that nobody takes them between now and the server's bind.
    """
    low, high = 10000, int(pathlib.Path('/proc/sys/net/ipv4/ip_local_port_range').read_text().split()[0])
    if high - low < 1000:
        low, high = 1024, 10000
    for _ in range(1000):
        first, locks = random.randrange(low, high - count), []
        try:
            for port in range(first, first + count):
                locks.append(socket.socket(socket.AF_UNIX))
                locks[-1].bind(f'\0shoal-test-port-{port}')
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(('127.0.0.1', port))
        except OSError:
            for lock in locks:
                lock.close()
            continue
        _reservations.extend(locks)
        return first
    raise AssertionError(f'no {count} free ports in a row between {low} and {high}')


def kill(pid, sig=signal.SIGKILL):
    try:
        os.kill(pid, sig)
    except ProcessLookupError:
        pass


def _stat(pid):
    """(parent, state, name) of a process, or None when it is gone."""
    try:
        raw = pathlib.Path(f'/proc/{pid}/stat').read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    name, rest = raw[raw.index('(') + 1:raw.rindex(')')], raw[raw.rindex(')') + 2:].split()
    return int(rest[1]), rest[0], name


def alive(pid):
    stat = _stat(pid)
    return stat is not None and stat[1] not in 'ZX'


def name_of(pid):
    stat = _stat(pid)
    return stat[2] if stat else ''


def descendants(pid):
    """Children, their children and so on, as far as they still have their parents."""
    children = {}
    for entry in pathlib.Path('/proc').iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))):
            children.setdefault(stat[0], []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        for child in children.get(queue.pop(), []):
            found.append(child)
            queue.append(child)
    return found


def wait_until(condition, timeout, what):
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f'waited {timeout} s for {what}')
        time.sleep(0.02)
    return value


def require_shared_data():
    """Ends the whole test as skipped, loudly, when the folder with the reference models is absent."""
    if not STORIES.exists():
        print(f'SKIPPED: {SHARED_DATA} is absent; the reference models that this test compares with live there.')
        sys.exit(SKIPPED)


class TestCase(unittest.TestCase):
    longMessage = True

    def setUp(self):
        scratch = tempfile.TemporaryDirectory(prefix='shoal-e2e-')
        self.addCleanup(scratch.cleanup)
        self.scratch = pathlib.Path(scratch.name)

    def assert_ok(self, result):
        self.assertEqual(result.code, OK, str(result))
        return result


def main():
    if not pathlib.Path(BINARY).exists():
        sys.exit(f'{BINARY} is not there: build it first, or set SHOAL_BINARY')
    unittest.main(verbosity=2)
