"""A shoal that was built with CUDA starts where there is no driver, says so, and computes on the CPU.

tests/run builds preset cuda where it finds nvcc; without that build, or beside a driver, this is skipped.
"""
import ctypes
import re
import subprocess
import sys
import unittest

import harness

BINARY = harness.ROOT / 'build-cuda' / 'shoal'
STORY = ['-n', '12', '--temp', '0', '-p', 'Once upon a time']
NO_DRIVER = 'no NVIDIA driver is installed (libcuda.so.1 was not found)'


class CudaBinaryTest(harness.TestCase):
    def shoal(self, *flags):
        return harness.run(BINARY, 'run', *STORY, *flags)

    def story(self):
        return self.assert_ok(harness.shoal('run', *STORY)).out

    def test_loads_nothing_of_cuda(self):
        """The driver, NCCL and CUDA's libraries are looked for when they are wanted, not by the loader."""
        dynamic = subprocess.run(['readelf', '-d', BINARY], check=True, capture_output=True, text=True).stdout
        needed = re.findall(r'NEEDED.*\[(.*)\]', dynamic)
        self.assertIn('libc.so.6', needed)
        self.assertEqual([name for name in needed if re.match('lib(cuda|cublas|nccl|nv)', name)], [])

    def test_cpu_by_name_says_nothing_of_gpus(self):
        result = self.assert_ok(self.shoal('--device', 'cpu'))
        self.assertEqual(result.out, self.story())
        self.assertNotIn('GPU', result.err)
        self.assertNotIn('CUDA', result.err)

    def test_auto_takes_the_cpu_and_says_why(self):
        result = self.assert_ok(self.shoal())
        self.assertEqual(result.out, self.story())
        self.assertIn(f'no GPU: {NO_DRIVER}; running on the CPU', result.err)

    def test_a_gpu_by_name_is_refused(self):
        for flags in [['--device', 'cuda'], ['--device', 'cuda:0'], ['--device', 'cuda,cpu'], ['-ngl', '2']]:
            result = self.shoal(*flags)
            self.assertEqual(result.code, harness.UNAVAILABLE, str(result))
            self.assertEqual(result.out, b'')
            self.assertEqual(result.err.count('\n'), 1, result.err)
            self.assertRegex(result.err, rf'^shoal: --device cuda(:0)?: {re.escape(NO_DRIVER)}')


def has_driver():
    try:
        ctypes.CDLL('libcuda.so.1')
        return True
    except OSError:
        return False


if __name__ == '__main__':
    if not BINARY.exists():
        print(f'skipped: there is no {BINARY}; tests/run builds it where it finds nvcc')
        sys.exit(harness.SKIPPED)
    if has_driver():
        print('skipped: this machine has an NVIDIA driver; tests/gpu_check is the test for it')
        sys.exit(harness.SKIPPED)
    unittest.main(verbosity=2)
