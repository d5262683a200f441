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
        self.model = self.scratch / 'model.gguf'

    def check(self, *placement):
        harness.generate(self.model, '--dim', DIM, '--layers', LAYERS, '--heads', HEADS, '--kv-heads', KV_HEADS,
                         '--ffn', FFN, '--vocab', VOCAB, '--context', CONTEXT)
        size = self.model.stat().st_size
        # Vocabulary and heads do not divide evenly: a tenth more than the even share is fair.
        bound = size / RANKS * 1.1 + KV_BYTES / RANKS * 1.4 + REST_BYTES
        self.assertGreater(size, bound, 'the bound could not tell a share from the whole file')
        peaks, _ = self.peaks(RANKS, *placement)
        for rank, peak in enumerate(peaks):
            self.assertLess(peak, bound, f'rank {rank} of {peaks}, the file has {size} bytes')
        print(f'{" ".join(map(str, placement))}: file {size >> 20} MiB, peaks {[p >> 20 for p in peaks]} MiB')

    def test_tensor_parallel(self):
        self.check('--tp', RANKS)

    def test_pipeline(self):
        self.check('--pp', RANKS)

    def test_streaming_keeps_to_its_limit(self):
        harness.generate(self.model, '--dim', 1024, '--layers', 24, '--ffn', 4096, '--context', 256)
        limit = 300 << 20
        self.assertGreater(self.model.stat().st_size, limit * 1.2)
        run = ['run', '-m', self.model, '-p', 'a', '-n', 3, '-c', 256, '--temp', 0, '--print-ids']
        expected = self.assert_ok(harness.shoal(*run, timeout=240))
        wrapper = harness.ROOT / 'tests' / 'tools' / 'peak_memory.py'
        streamed = self.assert_ok(harness.run(sys.executable, wrapper, self.scratch, harness.BINARY, *run,
                                              '--ram', limit, timeout=240))
        self.assertEqual(streamed.out, expected.out)
        peak = json.loads((self.scratch / 'rank-0.json').read_text())['peak_bytes']
        self.assertLess(peak, limit)


if __name__ == '__main__':
    harness.main()
