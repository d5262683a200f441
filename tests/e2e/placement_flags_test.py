"""Where layers and ranks go: what --pp-layers, -ngl, --split auto and --device do, and how they are refused."""
import json
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

    def test_plan_for_a_gpu_that_is_not_here(self):
        def plan(*flags):
            result = harness.shoal('plan', '-o', 'json', *flags, env={'XDG_CACHE_HOME': str(self.scratch)})
            return json.loads(self.assert_ok(result).out)

        model = harness.generate(self.scratch / 'm.gguf', '--dim', 1024, '--layers', 4, '--ffn', 4096)
        speed = ['-m', model, '-c', '512', '--gpu-speed', '1008,165,25']
        roomy = plan('--device', 'cuda', '--vram', '1G', *speed)
        rank = roomy['ranks'][0]
        self.assertEqual(rank['gpu']['memory_bytes_per_token'], 0)
        self.assertEqual(rank['bound'], "the GPU's memory")
        self.assertEqual(roomy['gpu']['link_bytes_per_s'], 25e9)
        least = rank['least_bytes']
        tight = plan('--device', 'cuda', '--vram', str(least + (1 << 20)), *speed)
        self.assertGreater(tight['ranks'][0]['gpu']['memory_bytes_per_token'], 0)
        self.assertEqual(tight['ranks'][0]['bound'], 'the link to the GPU')
        self.assertLess(tight['decode_tokens_per_s'], roomy['decode_tokens_per_s'])
        self.assertLess(tight['ranks'][0]['context_max'], rank['context_max'])
        # -ngl: the first layers on the CPU, of which the GPU's speed says nothing.
        both = plan('-ngl', '3', '--vram', '1G', *speed)['ranks']
        self.assertEqual([r['layers'] for r in both], [[0, 1], [1, 4]])
        self.assertEqual(['gpu' in r for r in both], [False, True])
        self.assertEqual(both[0]['bound'], 'computing')
        # Without its speed: where things are, not how fast.
        unknown = plan('-m', model, '-c', '512', '--vram', '1G')
        self.assertEqual(unknown['decode_tokens_per_s'], 0)
        self.assertEqual(unknown['ranks'][0]['gpu']['resident_bytes'], rank['gpu']['resident_bytes'])
        text = self.assert_ok(harness.shoal('plan', '--vram', '1G', env={'XDG_CACHE_HOME': str(self.scratch)}))
        self.assertIn(b'--gpu-speed', text.out)
        self.assertNotIn(b'together', text.out)
        for flags, message in [(['--device', 'cuda'], '--vram 24G plans for GPUs'),
                               (['--vram', '1G', '--gpu-speed', '3'], 'three numbers')]:
            result = harness.shoal('plan', *flags)
            self.assertEqual((result.code, result.out), (USAGE, b''), str(result))
            self.assertIn(message, result.err)

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
