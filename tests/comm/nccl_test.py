"""The NCCL communicator under mpirun, over a stand-in library: every collective, and what happens when a rank dies,
hangs, never comes, or NCCL reports an error.

NCCL_RANK names the test program, see nccl_rank.cc; SHOAL_NCCL the stand-in. CTest sets both.
"""
import os
import pathlib
import re
import signal
import subprocess
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / 'e2e'))
import harness  # noqa: E402

RANK = os.environ['NCCL_RANK']
DEADLINE_S = 10


def mpirun(ranks, what, timeout=100):
    return harness.run('mpirun', '-np', ranks, RANK, what, timeout=timeout)


class NcclTest(harness.TestCase):
    def test_collectives(self):
        for ranks in 1, 2, 3:
            with self.subTest(ranks=ranks):
                self.assert_ok(mpirun(ranks, 'collectives'))

    def test_an_error_that_nccl_reports_ends_the_job(self):
        result = mpirun(2, 'async_error', timeout=30)
        self.assertEqual(result.code, 69, str(result))
        self.assertIn('NCCL: a peer or the link failed: remote process exited', result.err)

    def test_a_rank_that_never_joins(self):
        result = self.assert_ok(mpirun(2, 'absent', timeout=30))
        self.assertIn('NCCL: joining the ranks: not done after 300ms; a rank did not come', result.err)

    def test_a_missing_library(self):
        result = subprocess.run([RANK, 'collectives'], capture_output=True, text=True, timeout=30,
                                env={**os.environ, 'SHOAL_NCCL': 'libno-such-nccl.so.2'})
        self.assertEqual(result.returncode, 69, result)
        self.assertIn('NCCL was not found: libno-such-nccl.so.2', result.stderr)

    def test_a_dead_or_hung_rank_is_an_error_within_ten_seconds(self):
        for sig in signal.SIGKILL, signal.SIGSTOP:
            with self.subTest(signal=sig):
                self.strike(sig)

    def strike(self, sig):
        process = subprocess.Popen(['mpirun', '-np', '3', RANK, 'loop'], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        pids = {}
        try:
            while len(pids) < 3:
                line = process.stdout.readline().decode()
                self.assertTrue(line, 'the job ended before it worked')
                if found := re.fullmatch(r'rank (\d) pid (\d+)\n', line):
                    pids[int(found[1])] = int(found[2])
            os.kill(pids[1], sig)
            self.assertNotEqual(process.wait(DEADLINE_S), 0)
            harness.wait_until(lambda: not any(harness.alive(p) for p in pids.values()), 2, 'the ranks to end')
        finally:
            for pid in harness.descendants(process.pid) + [process.pid, *pids.values()]:
                harness.kill(pid)
            process.stdout.close()
            process.wait()


if __name__ == '__main__':
    unittest.main(verbosity=2)
