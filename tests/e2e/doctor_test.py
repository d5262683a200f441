"""shoal doctor: what it tells of this machine, and of hosts behind a stand-in for ssh, healthy and ill."""
import json
import os
import subprocess
import unittest

import harness
from harness import CONFIG, DEMO_MODEL, OK, UNREADABLE, USAGE

# Runs the command here, but for hosts that are ill. Each host has a temporary folder of its own: two daemons of one
# mpirun that share one now and then crash over each other's copy of the machine's topology.
SSH = '''#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; [ "${1#*=}" != "$1" ] && shift; done
host=$1; shift
case $host in
  down) echo "ssh: connect to host down port 22: Connection refused" >&2; exit 255 ;;
  bare) echo "sh: 1: shoal: not found" >&2; exit 127 ;;
  ancient) echo "shoal: 'doctor' is not a command." >&2; exit 2 ;;
  chatty) echo "Welcome to chatty!" ;;
  old) eval "$*" | sed 's/"version":"[^"]*"/"version":"0.0.9"/'; exit ;;
  other) eval "$*" | sed 's/"fingerprint":"[^"]*"/"fingerprint":"0123456789abcdef"/'; exit ;;
esac
TMPDIR=$(dirname "$0")/$host && mkdir -p "$TMPDIR" && export TMPDIR
eval "$*"
'''


class DoctorTest(harness.TestCase):
    def doctor(self, *args, path='', code=None, env=None):
        result = harness.shoal('doctor', *args, '-o', 'json',
                               env={'PATH': f'{path}{os.environ["PATH"]}', **(env or {})})
        if code is not None:
            self.assertEqual(result.code, code, str(result))
        return json.loads(result.out)

    def cluster(self, hosts, *args):
        folder = self.scratch / 'bin'
        folder.mkdir(exist_ok=True)
        (folder / 'ssh').write_text(SSH)
        (folder / 'ssh').chmod(0o755)
        return self.doctor('--host', hosts, '--net', 'lo', *args, path=f'{folder}:')

    def wrong(self, report):
        return [f['what'] for f in report['findings'] if f['wrong']]

    def wrong_in_cluster(self, hosts, *args):
        return self.wrong(self.cluster(hosts, *args))

    def test_this_machine(self):
        report = self.doctor('--dir', self.scratch, '-m', DEMO_MODEL)
        self.assertEqual(report['healthy'], not self.wrong(report))
        (host,) = report['hosts']
        facts = host['facts']
        self.assertGreater(facts['cpu']['cores'], 0)
        self.assertIn('scalar', facts['cpu']['levels'])
        self.assertGreater(facts['memory']['total_bytes'], facts['memory']['free_bytes'])
        self.assertEqual(facts['mpi']['mpirun_version'], facts['mpi']['library_version'])
        self.assertGreater(facts['disk']['read_gbps'], 0)
        self.assertGreater(facts['disk']['write_gbps'], 0)
        self.assertRegex(facts['model']['fingerprint'], r'^[0-9a-f]{16}$')
        self.assertEqual(list(self.scratch.glob('.shoal-doctor*')), [], 'the measurement left its file')

    def test_text_and_exit_code_agree(self):
        result = harness.shoal('doctor')
        self.assertIn(result.code, (OK, CONFIG))
        self.assertEqual(result.code == OK, b'Nothing is wrong.' in result.out, str(result))
        for word in [b'CPU', b'memory', b'GPU', b'NCCL', b'Open MPI', b'io_uring']:
            self.assertIn(word, result.out)

    def test_mpirun_missing(self):
        tools = self.scratch / 'tools'
        tools.mkdir()
        result = harness.run(harness.BINARY, 'doctor', env={'PATH': str(tools)})
        self.assertEqual(result.code, CONFIG, str(result))
        self.assertIn(b'WRONG: mpirun does not run', result.out)
        self.assertIn(b'apt-get install openmpi-bin', result.out)

    def test_little_memory_to_lock(self):
        command = f'ulimit -l 64; exec {harness.BINARY} doctor -o json'
        process = subprocess.run(['bash', '-c', command], capture_output=True, check=False)
        report = json.loads(process.stdout)
        facts = report['hosts'][0]['facts']
        self.assertEqual(facts['memory']['memlock_bytes'], 64 << 10)
        if not facts['why_no_io_uring']:
            self.assertIn('lock 64.0 KiB', ' '.join(f['what'] for f in report['findings']))

    def test_folder_and_model_that_are_not_there(self):
        report = self.doctor('--dir', self.scratch / 'none', '-m', self.scratch / 'none.gguf', code=CONFIG)
        wrong = ' '.join(self.wrong(report))
        self.assertIn('could not be measured', wrong)
        self.assertIn('the model cannot be read', wrong)

    def test_healthy_hosts_and_the_network_between_them(self):
        report = self.cluster('pc1,pc2', '-m', DEMO_MODEL)
        self.assertEqual([h['name'] for h in report['hosts']], ['pc1', 'pc2'])
        self.assertEqual([w for w in self.wrong(report) if 'GPU' not in w], [], json.dumps(report, indent=1))
        (link,) = report['links']
        self.assertEqual((link['from'], link['to']), ('pc1', 'pc2'))
        self.assertGreater(link['latency_us'], 0)
        self.assertGreater(link['bandwidth_gbps'], 0)

    def test_ill_hosts(self):
        for host, what in {
                'down': 'down: ssh does not reach it: ssh: connect to host down port 22: Connection refused',
                'bare': 'bare: shoal does not start there: sh: 1: shoal: not found',
                'ancient': "ancient: its shoal is another one (exit code 2): shoal: 'doctor' is not a command.",
                'chatty': 'chatty: its answer is not one of shoal doctor',
                'old': 'old has shoal 0.0.9, pc1 has ',
        }.items():
            wrong = self.wrong_in_cluster(f'pc1,{host}')
            self.assertTrue(any(what in w for w in wrong), f'{host}: {wrong}')
        wrong = self.wrong_in_cluster('pc1,other', '-m', str(DEMO_MODEL))
        self.assertTrue(any('other has another model: 0123456789abcdef' in w for w in wrong), wrong)

    def test_usage(self):
        result = harness.shoal('doctor', '--hostfile', self.scratch / 'none')
        self.assertEqual(result.code, UNREADABLE, str(result))
        result = harness.shoal('doctor', '-o', 'xml')
        self.assertEqual(result.code, USAGE, str(result))


if __name__ == '__main__':
    unittest.main(verbosity=2)
