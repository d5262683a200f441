"""One-shot sums among ranks that are processes, each with a device of the stand-in: through each other's device memory
and through host memory that all map; and what the others do when a rank dies or hangs while their kernels wait for it.

ONE_SHOT_RANK names the test program, see one_shot_rank.cc; CTest sets it and the OMPI_* variables that mpirun needs.
"""
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / 'e2e'))
import harness  # noqa: E402

RANK = os.environ['ONE_SHOT_RANK']
HANG_S = 40  # longer than any wait of shoal's own, also on a busy machine


class OneShotProcesses(harness.TestCase):
    def test_sums(self):
        for memory in 'peer', 'host':
            for ranks in 2, 3:
                with self.subTest(memory=memory, ranks=ranks):
                    self.assert_ok(harness.run('mpirun', '-np', ranks, RANK, 'sums', memory, timeout=100))

    def test_a_hung_rank_is_an_error_of_those_that_wait(self):
        for memory in 'peer', 'host':
            with self.subTest(memory=memory):
                told = self.strike('loop', memory, signal.SIGSTOP)
                self.assertTrue(told, 'no survivor said what happened')
                for line in told:
                    self.assertRegex(line, r'^rank [02]: rank 1 on host \S+ ')

    def test_a_kernel_gives_up_by_itself(self):
        told = self.strike('blind', 'peer', signal.SIGSTOP)
        self.assertTrue(told, 'no survivor said what happened')
        for line in told:
            self.assertRegex(line, r'^rank [02]: rank 1 on host \S+ ')

    def test_a_killed_rank_ends_the_job(self):
        for memory in 'peer', 'host':  # mpirun sees it too, and may end the others before they speak
            with self.subTest(memory=memory):
                for line in self.strike('loop', memory, signal.SIGKILL):
                    self.assertRegex(line, r'^rank [02]: rank 1 on host \S+ ')

    def strike(self, what, memory, sig):
        """Ends or stops rank 1 of three at work; what the others said. (mpirun lets it go on at the end, and it
        speaks too.)"""
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(['mpirun', '-np', '3', RANK, what, memory], stdin=subprocess.DEVNULL,
                                       stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
            pids = {}
            try:
                while len(pids) < 3:
                    line = process.stdout.readline().decode()
                    if not line:
                        errors.seek(0)
                        self.fail(f'the job ended before it worked: {errors.read()!r}')
                    if found := re.fullmatch(r'rank (\d) pid (\d+)\n', line):
                        pids[int(found[1])] = int(found[2])
                os.kill(pids[1], sig)
                self.assertNotEqual(process.wait(HANG_S), 0)
                harness.wait_until(lambda: not any(harness.alive(p) for p in pids.values()), HANG_S, 'the ranks to end')
            finally:
                for pid in harness.descendants(process.pid) + [process.pid, *pids.values()]:
                    harness.kill(pid)
                process.stdout.close()
                process.wait()
            errors.seek(0)
            lines = errors.read().decode(errors='replace').splitlines()
            return [line for line in lines if re.match(r'rank [02]: ', line)]


if __name__ == '__main__':
    unittest.main(verbosity=2)
