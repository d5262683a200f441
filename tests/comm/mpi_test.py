"""The MPI backend under a bare mpirun: every collective, and what the survivors do when a rank dies, hangs or leaves.

MPI_RANK names the test program, see mpi_rank.cc; CTest sets it and the OMPI_* variables that mpirun needs.
"""
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / 'e2e'))
import harness  # noqa: E402

RANK = os.environ['MPI_RANK']
DEADLINE_S = 10
OVER_TCP = ['--mca', 'pml', 'ob1', '--mca', 'btl', 'self,tcp', '--mca', 'btl_tcp_if_include', 'lo']


def mpirun(ranks, what, *flags, timeout=200):
    return harness.run('mpirun', *flags, '-np', ranks, RANK, what, timeout=timeout)


class CollectivesTest(harness.TestCase):
    def test_all_reduce_matches_the_serial_sum(self):
        for ranks in 2, 3, 5, 8:
            with self.subTest(ranks=ranks):
                self.assert_ok(mpirun(ranks, 'all_reduce'))

    def test_all_reduce_over_tcp(self):
        self.assert_ok(mpirun(3, 'all_reduce', *OVER_TCP))

    def test_other_collectives(self):
        for ranks in 1, 2, 5:
            with self.subTest(ranks=ranks):
                self.assert_ok(mpirun(ranks, 'collectives'))
        self.assert_ok(mpirun(4, 'collectives', *OVER_TCP))

    def test_bench_prints_the_columns_of_nccl_tests(self):
        result = self.assert_ok(mpirun(2, 'bench'))
        lines = result.out.decode().splitlines()
        self.assertEqual(lines[0].split(), '# size count type redop root time algbw busbw #wrong'.split())
        rows = [line.split() for line in lines if not line.startswith('#')]
        self.assertEqual({row[2] for row in rows}, {'float', 'half', 'q8'})
        for row in rows:
            self.assertEqual(len(row), 9, row)
            self.assertEqual(int(row[0]), 4 * int(row[1]))
            self.assertGreater(float(row[5]), 0)
            self.assertEqual(row[8], '0', f'wrong sums: {row}')
        self.assertEqual(max(int(row[0]) for row in rows), 64 << 20)


class FaultTest(harness.TestCase):
    def start(self, what, ranks=3, flags=()):
        """A running job whose ranks have all met; returns its process and the ranks' process ids by rank."""
        errors = tempfile.TemporaryFile()
        self.addCleanup(errors.close)
        process = subprocess.Popen(['mpirun', *flags, '-np', str(ranks), RANK, what], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        self.addCleanup(self.clean_up, process)
        pids = {}
        while len(pids) < ranks:
            line = process.stdout.readline().decode()
            if not line:
                errors.seek(0)
                self.fail(f'the job ended before it worked: {errors.read()!r}')
            if found := re.fullmatch(r'rank (\d) pid (\d+)\n', line):
                pids[int(found[1])] = int(found[2])
        return process, pids, errors

    @staticmethod
    def clean_up(process):
        for pid in harness.descendants(process.pid) + [process.pid]:
            harness.kill(pid)
        process.stdout.close()
        process.wait()

    def strike(self, what, victim, sig, flags=()):
        process, pids, errors = self.start(what, flags=flags)
        os.kill(pids[victim], sig)
        start = time.monotonic()
        try:
            process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.fail(f'the job still runs {DEADLINE_S} s after signal {sig} to rank {victim}')
        self.assertLess(time.monotonic() - start, DEADLINE_S)
        self.assertNotEqual(process.returncode, 0)
        harness.wait_until(lambda: not any(harness.alive(p) for p in pids.values()), 2, 'the ranks to end')
        errors.seek(0)
        told = [line for line in errors.read().decode(errors='replace').splitlines() if line.startswith('shoal: ')]
        return told

    def expect_named(self, told, victim):
        self.assertEqual(len(told), 1, told)
        self.assertRegex(told[0], rf'^shoal: rank {victim} on host \S+ was lost: ')

    def test_hung_rank_is_named_by_one_survivor(self):
        self.expect_named(self.strike('loop', 2, signal.SIGSTOP), 2)

    def test_hung_rank_0_is_named_by_the_next(self):
        self.expect_named(self.strike('loop', 0, signal.SIGSTOP), 0)

    def test_hung_rank_while_the_others_compute(self):
        self.expect_named(self.strike('compute', 1, signal.SIGSTOP), 1)

    def test_hung_rank_over_tcp(self):
        self.expect_named(self.strike('loop', 1, signal.SIGSTOP, OVER_TCP), 1)

    def test_killed_rank(self):
        # mpirun sees it too, and may kill the survivor that would have told: then it tells itself.
        for what, victim, flags in [('loop', 1, ()), ('loop', 0, ()), ('compute', 2, ()), ('loop', 1, OVER_TCP)]:
            with self.subTest(what=what, victim=victim, flags=flags):
                for line in self.strike(what, victim, signal.SIGKILL, flags):
                    self.assertIn(f'rank {victim} on host', line)

    def test_killed_mpirun_takes_its_ranks_along(self):
        process, pids, _ = self.start('loop')
        process.kill()
        process.wait()
        harness.wait_until(lambda: not any(harness.alive(p) for p in pids.values()), DEADLINE_S, 'the ranks to end')

    def test_slow_rank_is_not_taken_for_dead(self):
        self.assert_ok(mpirun(3, 'slow'))

    def test_abort_reaches_all_with_its_reason(self):
        result = mpirun(3, 'abort', timeout=30)
        self.assertEqual(result.code, 65, str(result))
        self.assertIn('rank 1 on host', result.err)
        self.assertIn('shard 1 is corrupt', result.err)

    def test_rank_that_left_fails_those_who_wait_for_it(self):
        result = mpirun(3, 'leave', timeout=30)
        self.assertEqual(result.code, 69, str(result))
        self.assertRegex(result.err, r'rank 1 on host \S+ left the job')


if __name__ == '__main__':
    unittest.main(verbosity=2)
