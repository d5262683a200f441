"""The systemd unit: systemd takes it, and what it runs serves and ends as the unit expects."""
import pathlib
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / 'e2e'))
import harness
import serve_harness

FOLDER = harness.ROOT / 'deploy' / 'systemd'
UNIT = (FOLDER / 'shoal.service').read_text()
SETTINGS = (FOLDER / 'serve.env').read_text()


def settings(text):
    return dict(line.split('=', 1) for line in text.splitlines() if line and not line.startswith('#'))


class SystemdTest(harness.TestCase):
    def test_systemd_takes_it(self):
        unit = self.scratch / 'shoal.service'
        installed = UNIT.replace('/usr/local/bin/shoal', str(harness.BINARY)).replace('/etc/shoal/', f'{FOLDER}/')
        unit.write_text(installed)
        said = subprocess.run(['systemd-analyze', 'verify', '--man=no', '--recursive-errors=no', unit],
                              capture_output=True, text=True, timeout=60)
        about_it = [line for line in said.stderr.splitlines() if 'shoal' in line]
        self.assertEqual((said.returncode, about_it), (0, []), said.stderr)
        # It does speak up.
        unit.write_text(installed.replace('KillMode=mixed', 'KillMode=mxied'))
        said = subprocess.run(['systemd-analyze', 'verify', '--man=no', '--recursive-errors=no', unit],
                              capture_output=True, text=True, timeout=60)
        self.assertIn('mxied', said.stderr)

    def test_every_setting_is_a_flag(self):
        known = set(re.findall(r'\(Env:(SHOAL_\w+)\)', harness.shoal('serve', '--help').out.decode()))
        named = set(re.findall(r'^#?(SHOAL_\w+)=', SETTINGS, re.M))
        self.assertGreater(len(named), 5)
        self.assertEqual(named - known, set())

    def test_serves_and_ends(self):
        """SIGTERM to the coordinator alone (KillMode=mixed): the ranks end, the exit code is a success."""
        self.assertIn('KillMode=mixed', UNIT)
        self.assertRegex(UNIT, r'ExecStart=\S+/shoal serve\n')
        environment = {**settings(SETTINGS), 'SHOAL_TP': '2', 'HOME': str(self.scratch)}
        del environment['SHOAL_PORT']
        server = serve_harness.Server(env=environment)
        self.addCleanup(server.kill)
        ranks = server.ranks()
        self.assertEqual(len(ranks), 2)
        self.assertEqual(server.post('/v1/completions', {'prompt': 'The sea', 'max_tokens': 4})[0], 200)
        server.process.terminate()
        self.assertEqual(server.process.wait(45), 0, server.log())
        harness.wait_until(lambda: not any(pathlib.Path(f'/proc/{pid}').exists() for pid in ranks), 10, 'the ranks to end')

    def test_errors_that_a_restart_does_not_mend(self):
        """Those that serve ends with when its flags, keys, model or memory are wrong are listed, and no others."""
        listed = re.search(r'^RestartPreventExitStatus=(.*)$', UNIT, re.M)[1].split()
        self.assertEqual(listed, ['2', '3', '65', '66', '77', '78'])
        for flags in (('--parallel', 0), ('-m', self.scratch / 'absent.gguf'), ('--listen', '0.0.0.0'),
                      ('--api-key-file', self.scratch / 'absent')):
            with self.subTest(flags=flags):
                self.assertIn(str(harness.shoal('serve', *flags, timeout=60).code), listed)


if __name__ == '__main__':
    harness.main()
