"""A rank that dies or hangs ends the whole job soon, with exit code 69, and leaves nothing running."""
import os
import pathlib
import signal
import subprocess
import time
import tempfile
import unittest

import harness

DEADLINE_S = 10


class FaultTest(harness.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory(prefix='shoal-e2e-')
        cls.addClassCleanup(folder.cleanup)
        # Slow enough per token that the job is still generating when the fault strikes.
        cls.model = harness.generate(pathlib.Path(folder.name, 'slow.gguf'), '--dim', 1024, '--layers', 8, '--ffn', 4096,
                                     '--vocab', 2048, '--heads', 16, '--kv-heads', 16, '--context', 131072)

    def start(self):
        """A job of two ranks that has printed some text; returns the process and the ids of its ranks."""
        process = subprocess.Popen([harness.BINARY, 'run', '-m', str(self.model), '-p', 'a', '--no-display-prompt', '-n', '100000', '-c', '110000',
                                    '--temp', '0', '--tp', '2'], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, start_new_session=True, cwd=harness.ROOT)
        self.addCleanup(self.clean_up, process)
        self.assertTrue(process.stdout.read(1), 'the job ended before it generated anything')
        # The launcher itself may carry the same name; ranks are the leaves of the tree.
        family = harness.descendants(process.pid)
        ranks = [p for p in family if harness.name_of(p) == pathlib.Path(harness.BINARY).name
                 and not harness.descendants(p)]
        self.assertEqual(len(ranks), 2, [(p, harness.name_of(p)) for p in family])
        return process, sorted(ranks), family

    @staticmethod
    def clean_up(process):
        for pid in harness.descendants(process.pid) + [process.pid]:
            harness.kill(pid)
        process.stdout.close()
        process.stderr.close()
        process.wait()

    def strike(self, victim, sig):
        process, ranks, family = self.start()
        os.kill(ranks[victim], sig)
        start = time.monotonic()
        try:
            _, err = process.communicate(timeout=DEADLINE_S + 5)
        except subprocess.TimeoutExpired:
            self.fail(f'the job still ran {DEADLINE_S + 5} s after signal {sig} to rank {victim}')
        seconds = time.monotonic() - start
        self.assertEqual(process.returncode, harness.UNAVAILABLE, err[-3000:])
        self.assertLess(seconds, DEADLINE_S)
        self.assertRegex(err.decode(errors='replace'), r'rank \d')
        harness.wait_until(lambda: not any(harness.alive(p) for p in family), 30, 'the processes of the job to end')

    def test_killed_worker(self):
        self.strike(1, signal.SIGKILL)

    def test_killed_rank_0(self):
        self.strike(0, signal.SIGKILL)

    def test_hung_worker(self):
        self.strike(1, signal.SIGSTOP)

    def test_hung_rank_0(self):
        self.strike(0, signal.SIGSTOP)

    def test_interrupt_ends_the_job(self):
        process, _, family = self.start()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=DEADLINE_S)
        self.assertEqual(process.returncode, 130)
        harness.wait_until(lambda: not any(harness.alive(p) for p in family), 30, 'the processes of the job to end')


if __name__ == '__main__':
    harness.main()
