"""Where layers and ranks go: what --pp-layers, -ngl, --split auto and --device do, and how they are refused."""
import re
import unittest

import harness
from harness import UNAVAILABLE, USAGE

STORY = ['--temp', '0', '-n', '16', '-p', 'Once upon a time']  # the demo model has four layers


class PlacementFlagsTest(harness.TestCase):
    def run_story(self, *flags):
        return harness.shoal('run', *STORY, *flags)

    def story(self):
        return self.assert_ok(self.run_story('--device', 'cpu')).out

    def refused(self, code, message, *flags):
        result = self.run_story(*flags)
        self.assertEqual((result.code, result.out), (code, b''), str(result))
        self.assertIn(message, result.err)
        self.assertEqual(result.err.count('\n'), 1, result.err)

    def test_layers_of_stages(self):
        result = self.assert_ok(self.run_story('--in-process', '--pp', '2', '--pp-layers', '1,3'))
        self.assertEqual(result.out, self.story())
        self.assertEqual(re.findall(r'layers (\d+-\d+)', result.err), ['0-0', '1-3'])
        self.refused(USAGE, "that make up the model's 4", '--in-process', '--pp', '2', '--pp-layers', '1,4')
        self.refused(USAGE, '--pp-layers 1,3 has 2 numbers, but --pp is 1', '--pp-layers', '1,3')

    def test_gpu_layers(self):
        for flag in ['-ngl', '--gpu-layers', '--n-gpu-layers']:
            self.assertEqual(self.assert_ok(self.run_story(flag, '0')).out, self.story())
        self.refused(USAGE, '-ngl 2 divides the layers', '-ngl', '2', '--pp', '2')
        self.refused(USAGE, '-ngl 2 divides the layers', '-ngl', '2', '--device', 'cpu')
        # Some layers, and all of them; the binary under test has no CUDA.
        for layers in ['2', '99']:
            self.refused(UNAVAILABLE, 'built without CUDA', '-ngl', layers)

    def test_split_auto_needs_gpus(self):
        self.refused(USAGE, '--split auto goes by the memory of GPUs', '--in-process', '--tp', '2', '--split', 'auto')

    def test_devices_of_other_hosts_are_theirs_to_have(self):
        """A PC without a GPU may start ranks on those that have one: it is not asked for its own."""
        self.refused(UNAVAILABLE, '--device cuda: this shoal was built without CUDA', '--tp', '2', '--device', 'cuda')
        result = self.run_story('--tp', '2', '--device', 'cuda', '--host', 'shoal-test-a.invalid,shoal-test-b.invalid')
        self.assertEqual(result.code, UNAVAILABLE, str(result))
        self.assertNotIn('--device', result.err)
        self.assertIn('mpirun', result.err)
        self.refused(USAGE, "'cudda' is not a device", '--tp', '2', '--device', 'cudda', '--host', 'a.invalid,b.invalid')


if __name__ == '__main__':
    unittest.main(verbosity=2)
