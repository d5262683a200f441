"""What can be wrong with the input of several processes only: said once, by the class's exit code, with no text."""
import harness
from harness import CONFIG, UNAVAILABLE, UNREADABLE, USAGE


class RanksInputTest(harness.TestCase):
    def refused(self, code, result, message):
        self.assertEqual((result.code, result.out), (code, b''), str(result))
        self.assertIn(message, result.err)

    def test_hosts_with_different_models(self):
        """Each PC has its own copy of the file, and one was made with another quantization."""
        small = ('--dim', 64, '--layers', 1, '--heads', 2, '--kv-heads', 2, '--ffn', 64, '--vocab', 259)
        one, other = (harness.generate(self.scratch / f'{kind}.gguf', *small, '--type', kind)
                      for kind in ('q8_0', 'q4_0'))
        script = 'if [ $OMPI_COMM_WORLD_RANK = 1 ]; then m=$2; else m=$1; fi; exec "$0" run -m $m -p x -n 2 --tp 2'
        start = ['mpirun', '-np', 2, 'sh', '-c', script, harness.BINARY]
        self.assert_ok(harness.run(*start, one, one, timeout=60))
        result = harness.run(*start, one, other, timeout=60)
        self.refused(CONFIG, result, 'rank 1 on ')
        self.assertIn('another model than rank 0', result.err)

    def test_absent_prompt(self):
        absent = self.scratch / 'absent'
        result = harness.shoal('run', '-f', absent, '--tp', 2, '--ram', '1M', timeout=60)
        self.refused(UNREADABLE, result, str(absent))
        self.assertEqual(result.err.count('shoal: '), 1, result.err)

    def test_mpirun_by_hand(self):
        self.refused(USAGE, harness.mpirun(2, 'run', '-p', 'x', '--tp', 2, '--in-process', timeout=60),
                     '--in-process keeps all ranks in one process')
        self.refused(USAGE, harness.mpirun(2, 'run', '-p', 'x', '--tp', 3, timeout=60), 'use mpirun -np 3')
        self.refused(UNAVAILABLE, harness.mpirun(2, 'run', '-p', 'x', '--tp', 2, '--net', 'eth99', timeout=60),
                     'no network interface eth99')


if __name__ == '__main__':
    harness.main()
