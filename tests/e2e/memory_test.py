"""Peak memory of each rank is its share of the weights, its KV cache and a bounded rest, never the whole file."""
import json
import pathlib
import sys
import unittest

import harness

RANKS = 3
REST_BYTES = 300 << 20  # code, libraries, MPI, staging and activations
DIM, LAYERS, HEADS, KV_HEADS, FFN, VOCAB, CONTEXT = 2048, 20, 16, 8, 7168, 4096, 2048
KV_BYTES = 2 * LAYERS * CONTEXT * (DIM // HEADS) * KV_HEADS * 4  # at most f32


class MemoryTest(harness.TestCase):
    def peaks(self, ranks, *placement):
        """Runs the big model and returns the peak resident bytes of each rank as the kernel counted them."""
        wrapper = harness.ROOT / 'tests' / 'tools' / 'peak_memory.py'
        result = harness.run('mpirun', '-np', ranks, sys.executable, wrapper, self.scratch, harness.BINARY, 'run',
                             '-m', self.model, '-p', 'a', '-n', 4, '-c', CONTEXT, '--temp', 0, *placement, timeout=240)
        self.assert_ok(result)
        files = sorted(self.scratch.glob('rank-*.json'))
        self.assertEqual(len(files), ranks)
        return [json.loads(f.read_text())['peak_bytes'] for f in files], result

    def setUp(self):
        super().setUp()
        self.model = harness.generate(self.scratch / 'big.gguf', '--dim', DIM, '--layers', LAYERS, '--heads', HEADS,
                                      '--kv-heads', KV_HEADS, '--ffn', FFN, '--vocab', VOCAB, '--context', CONTEXT)
        self.size = self.model.stat().st_size
        share = self.size / RANKS
        # The bound must be able to tell a share from the whole file.
        self.assertGreater(self.size, share * 1.1 + KV_BYTES / RANKS * 1.4 + REST_BYTES)

    def check(self, *placement):
        peaks, _ = self.peaks(RANKS, *placement)
        # Vocabulary and heads do not divide evenly: a tenth more than the even share is fair.
        bound = self.size / RANKS * 1.1 + KV_BYTES / RANKS * 1.4 + REST_BYTES
        for rank, peak in enumerate(peaks):
            self.assertLess(peak, bound, f'rank {rank} of {peaks}, the file has {self.size} bytes')
        print(f'{" ".join(map(str, placement))}: file {self.size >> 20} MiB, peaks {[p >> 20 for p in peaks]} MiB')

    def test_tensor_parallel(self):
        self.check('--tp', RANKS)

    def test_pipeline(self):
        self.check('--pp', RANKS)


if __name__ == '__main__':
    harness.main()
