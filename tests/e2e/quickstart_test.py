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

    def test_packages_of_another_architecture_are_others(self):
        database = self.scratch / 'dpkg'
        (database / 'info').mkdir(parents=True)
        native = self.assert_ok(harness.run('dpkg', '--print-architecture')).out.decode().strip()
        (database / 'arch').write_text(f'{native}\narm64\n')
        entry = 'Package: {}\nStatus: install ok installed\nArchitecture: {}\nMulti-Arch: {}\nVersion: 1\n' \
                'Maintainer: nobody\nDescription: a package\n\n'
        (database / 'status').write_text(''.join(entry.format(*package) for package in [
            ('both', native, 'same'), ('both', 'arm64', 'same'), ('foreign', 'arm64', 'same'),
            ('scripts', 'all', 'foreign')]))
        for name, installed in [('both', True), ('both:arm64', True), ('scripts', True), ('foreign:arm64', True),
                                ('foreign', False), ('none', False), ('scripts:arm64', False)]:
            packages = self.scratch / 'packages.txt'
            packages.write_text(f'# a comment\n\n{name}\n')
            result = harness.run(harness.ROOT / 'deploy' / 'install-packages', '--check', packages,
                                 env={'DPKG_ADMINDIR': str(database)})
            self.assertEqual(result.code == 0, installed, f'{name}: {result}')

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
