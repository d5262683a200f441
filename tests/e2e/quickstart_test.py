"""deploy/quickstart works, works again without building anything, and says what to do when a step fails."""
import os
import re
import unittest

import harness

QUICKSTART = harness.ROOT / 'deploy' / 'quickstart'
BUILT = harness.ROOT / 'build' / 'shoal'


class QuickstartTest(harness.TestCase):
    def quickstart(self, **kwargs):
        return harness.run(QUICKSTART, timeout=1400, **kwargs)

    def test_twice(self):
        first = self.assert_ok(self.quickstart())
        built = BUILT.stat().st_mtime_ns
        self.assertIn(b'small fish', first.out)
        self.assertRegex(first.err, r'tok(ens)?/s')
        self.assertEqual(len(set(re.findall(r'rank (\d+)', first.err))), 2, first.err)

        second = self.assert_ok(self.quickstart())
        self.assertEqual(BUILT.stat().st_mtime_ns, built, 'the second run built again')
        self.assertEqual(second.out, first.out)
        log = (harness.ROOT / 'build' / 'quickstart.log').read_text()
        self.assertIn('no work to do', log)
        self.assertNotIn('Installing', log)

    def test_from_another_folder(self):
        self.assert_ok(self.quickstart(cwd='/'))

    def broken(self, tool):
        """quickstart with a tool that fails: the message names the command and gives advice."""
        folder = self.scratch / f'without {tool}'
        folder.mkdir()
        stub = folder / tool
        stub.write_text(f'#!/bin/sh\necho "{tool}: the stub was called" >&2\nexit 1\n')
        stub.chmod(0o755)
        result = self.quickstart(env={'PATH': f'{folder}:{os.environ["PATH"]}'})
        self.assertNotEqual(result.code, 0, str(result))
        self.assertIn('the stub was called', result.err)
        return result.err

    def test_failures_name_the_command_and_what_to_do(self):
        # The stub's own name in the message would prove nothing: look for the whole command and for the advice.
        err = self.broken('cmake')
        self.assertIn('this command failed: cmake --preset release', err)
        self.assertIn('remove build/', err)
        err = self.broken('mpirun')
        self.assertIn('this command failed: mpirun -np 2 build/shoal run', err)
        self.assertIn('mpirun -np 2 hostname', err)


if __name__ == '__main__':
    unittest.main(verbosity=2)
