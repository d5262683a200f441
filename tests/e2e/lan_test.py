"""Several PCs: two hosts with a gigabit between them (network namespaces), from starting ranks on both to a pulled cable."""
import json
import os
import subprocess
import sys
import tempfile
import time
import unittest

import harness
from harness import BINARY, ROOT, UNAVAILABLE

sys.path.insert(0, str(ROOT / 'tests' / 'tools'))
from lan import Lan  # noqa: E402

STORY = ('run', '-p', 'Once upon a time', '-n', 40, '--temp', 0, '-t', 1)


def received(lan, host):
    """Bytes that the switch sent to a host."""
    out = subprocess.run(['ip', '-n', lan.switch, '-s', '-j', 'link', 'show', f'port{host}'], check=True, stdout=subprocess.PIPE).stdout
    return json.loads(out)[0]['stats64']['tx']['bytes']


def wait_for(what, condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f'{what}: not within {seconds} s')
        time.sleep(0.05)


class LanTest(unittest.TestCase):
    def setUp(self):
        self.lan = self.enterContext(Lan(3, '1gbit'))
        self.hosts = ('--hostfile', self.lan.hostfile([1, 2]))

    def shoal(self, *args):
        process = self.lan.start(1, [BINARY, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 0, err)
        return out, err

    def test_two_hosts_tell_the_story_that_one_tells(self):
        alone, _ = self.shoal(*STORY)
        for flags in (('--tp', 2, '--wire', 'f32'), ('--pp', 2)):
            with self.subTest(flags):
                out, err = self.shoal(*STORY, *flags, *self.hosts)
                self.assertEqual(out, alone)
                self.assertNotIn('sums travel', err)

    def test_sums_travel_as_the_link_needs(self):
        out, err = self.shoal(*STORY, '--tp', 2, *self.hosts)
        self.assertRegex(err, r'shoal: sums travel as q8 \(--wire\): the slowest link carries 0\.\d+ Gbit/s\n')
        self.assertIn('rank 1 on host2', err)
        self.assertTrue(out.startswith('Once upon a time'), out)

    def test_a_pulled_cable_ends_the_job_on_both_hosts(self):
        job = self.lan.start(1, [BINARY, 'bench', '-p', 0, '-n', 128, '-r', 10000, '-t', 1, '--tp', 2, *self.hosts],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        wait_for('the ranks exchange sums', lambda: job.poll() is not None or received(self.lan, 2) > 10e6, 60)
        self.lan.pull_cable(2)
        _, err = job.communicate(timeout=10)
        self.assertEqual(job.returncode, UNAVAILABLE, err)
        self.assertRegex(err, r'rank 1 on host host2 was lost: no sign of life')
        wait_for('host 2 is left without a rank', lambda: not self.lan.processes(2), 10)
        self.assertEqual(self.lan.processes(1), [])


    def test_a_job_starts_on_the_hosts_that_answer(self):
        alone, _ = self.shoal(*STORY)
        self.lan.pull_cable(2)
        hosts = ','.join(f'{self.lan.address(n)}:1' for n in (1, 2, 3))
        out, err = self.shoal(*STORY, '--tp', 3, '--split', '2,1,1', '--wire', 'f32', '--host', hosts, '--allow-fewer-hosts')
        self.assertEqual(out, alone)
        self.assertIn(f'host {self.lan.address(2)} does not answer', err)
        self.assertIn('rank 1 on host3', err)
        self.assertNotIn('rank 2 on', err)

    def get(self, path, *args):
        """What curl on host 1 prints; '' when it fails."""
        return subprocess.run(['ip', 'netns', 'exec', f'{self.lan.prefix}1', 'curl', '-sf', '-m', '60', *map(str, args), f'http://127.0.0.1:8080{path}'],
                              stdout=subprocess.PIPE, text=True, check=False).stdout

    def test_a_stream_of_the_server_goes_on_without_the_host_that_is_gone(self):
        # Slow enough to lose a host on the way; stages give the same bits wherever they are.
        folder = self.enterContext(tempfile.TemporaryDirectory())
        model = harness.generate(f'{folder}/slow.gguf', '--dim', 512, '--layers', 12, '--ffn', 4096, '--context', 2048)
        request = json.dumps({'prompt': 'w1 w2', 'max_tokens': 600, 'temperature': 0, 'ignore_eos': True})
        alone = self.lan.start(1, [BINARY, 'serve', '-m', model, '--port', 8080, '-t', 1], stderr=subprocess.DEVNULL)
        wait_for('ready', lambda: self.get('/health/ready'), 60)
        expected = json.loads(self.get('/v1/completions', '-H', 'Content-Type: application/json', '-d', request))['choices'][0]['text']
        alone.terminate()
        alone.wait(20)

        log = self.enterContext(tempfile.TemporaryFile('w+'))
        serve = self.lan.start(1, [BINARY, 'serve', '-m', model, '--port', 8080, '-t', 1, '--pp', 2, *self.hosts], stderr=log)
        wait_for('ready', lambda: self.get('/health/ready'), 60)
        self.assertNotEqual(self.lan.processes(2), [])
        stream = subprocess.Popen(['ip', 'netns', 'exec', f'{self.lan.prefix}1', 'curl', '-sN', '-m', '100', 'http://127.0.0.1:8080/v1/completions', '-H',
                                   'Content-Type: application/json', '-d', request[:-1] + ', "stream": true}'], stdout=subprocess.PIPE, text=True)
        text = ''
        chunks = 0
        for line in stream.stdout:
            if not line.startswith('data: {'):
                continue
            text += json.loads(line[6:])['choices'][0]['text']
            chunks += 1
            if chunks == 20:
                self.lan.pull_cable(2)
        self.assertEqual(stream.wait(), 0)
        self.assertEqual(text, expected)
        serve.terminate()
        self.assertEqual(serve.wait(30), 0)
        log.seek(0)
        err = log.read()
        self.assertIn(f'host {self.lan.address(2)} does not answer', err)
        self.assertIn(f'going on with --tp 1 --pp 1 on {self.lan.address(1)}:1', err)


if __name__ == '__main__':
    if os.geteuid() != 0:
        print('making network namespaces needs root')
        sys.exit(harness.SKIPPED)
    unittest.main(verbosity=2)
