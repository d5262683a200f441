"""--kv-cache-dir: a prompt seen before starts where it left off, and nothing that happens to the folder loses a request."""
import os
import re
import signal
import subprocess

import harness

WORDS = ' '.join(f'{i} fish swim to the {i * 7 % 13} reefs of the {i * 5 % 11} seas,' for i in range(20))


class KvCacheTest(harness.TestCase):
    def setUp(self):
        super().setUp()
        self.dir = self.scratch / 'kv'
        self.model = harness.generate(self.scratch / 'm.gguf', '--dim', 256, '--layers', 4, '--heads', 4, '--kv-heads', 4,
                                      '--ffn', 512, '--vocab', 512, '--context', 2048)

    def complete(self, *flags, prompt=WORDS, cached=True, n=16):
        folder = ['--kv-cache-dir', self.dir] if cached else []
        return self.assert_ok(harness.shoal('run', '-m', self.model, '-p', prompt, '-n', n, '--temp', 0, '-c', 2048, *folder, *flags))

    @staticmethod
    def cached_tokens(result):
        """(tokens of the prompt, tokens that were not computed)"""
        found = re.search(r'prompt (\d+) tokens(?: \((\d+) cached\))?', result.err)
        return int(found[1]), int(found[2] or 0)

    def check_restored(self, result, plain):
        tokens, cached = self.cached_tokens(result)
        self.assertEqual(cached, (tokens - 1) // 16 * 16, str(result))
        self.assertEqual(result.out, plain.out)

    def test_second_run_skips_the_prompt(self):
        plain = self.complete(cached=False)
        first = self.complete()
        self.assertEqual(self.cached_tokens(first)[1], 0)
        self.assertEqual(first.out, plain.out)
        self.assertGreater(self.cached_tokens(first)[0], 600)  # several pages
        self.check_restored(self.complete(), plain)
        self.assertGreater(self.cached_tokens(self.complete(n=1))[1], 600)  # ended by its first token
        longer = self.complete(prompt=WORDS + ' and then they came home')
        self.assertGreater(self.cached_tokens(longer)[1], 600)

    def test_every_split_has_its_own(self):
        for split in (['--tp', 2], ['--pp', 2]):
            plain = self.complete(*split, cached=False)
            first = self.complete(*split)
            self.assertEqual(self.cached_tokens(first)[1], 0, split)
            second = self.complete(*split)
            self.check_restored(second, plain)
            self.assertRegex(second.err, r'rank 1 KV pages on disk: \d+ written, [1-9]\d* read back, 0 lost')

    def test_killed_in_the_middle(self):
        plain = self.complete(cached=False)
        for _ in range(3):
            process = subprocess.Popen([harness.BINARY, 'run', '-m', self.model, '-p', WORDS, '-n', '1500', '--temp', '0', '-c', '2048',
                                        '--ignore-eos', '--kv-cache-dir', self.dir],
                                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            # Killed while pages are written: when the first have reached the file.
            harness.wait_until(lambda: process.poll() is not None or
                               any(f.stat().st_size > 100_000 for f in self.dir.glob('*')), 60, 'the first page')
            process.send_signal(signal.SIGKILL)
            process.wait()
            self.assertEqual(self.complete().out, plain.out)
        self.check_restored(self.complete(), plain)

    def test_damaged_files(self):
        plain = self.complete(cached=False)
        self.complete()
        file, = self.dir.glob('*.pages')
        whole = file.read_bytes()
        for name, damaged in {
                'a byte': whole[:20_000] + bytes([whole[20_000] ^ 1]) + whole[20_001:],
                'zeros': whole[:8192] + bytes(len(whole) - 8192),
                'half': whole[:len(whole) // 2 + 77],
                'version': whole[:8] + b'\x09' + whole[9:],
                'nothing': b'',
                'text': b'hello',
        }.items():
            with self.subTest(name):
                file.write_bytes(damaged)
                result = self.complete()
                self.assertEqual(result.out, plain.out)
                self.assertLessEqual(result.err.count(str(file)), 1, 'said once\n' + str(result))
                self.check_restored(self.complete(), plain)

    def test_full_disk(self):
        if os.geteuid() != 0:
            self.skipTest('mounting needs root')
        plain = self.complete(cached=False)
        self.dir.mkdir()
        mounted = harness.run('mount', '-t', 'tmpfs', '-o', 'size=256k', 'none', self.dir)
        if mounted.code != 0:
            self.skipTest('mount is not permitted here')
        self.addCleanup(harness.run, 'umount', '-l', self.dir)
        for _ in range(2):
            result = self.complete()
            self.assertEqual(result.out, plain.out)
            self.assertEqual(result.err.count('are computed again when needed'), 1, str(result))
        # A context that needs the disk cannot do without.
        result = harness.shoal('run', '-m', self.model, '-p', WORDS, '-n', 4, '-c', 2048, '--kv-cache-dir', self.dir,
                               '--kv-tokens', 768)
        self.assertEqual(result.code, harness.UNAVAILABLE, str(result))
        self.assertIn('--kv-tokens', result.err)

    def test_two_at_once(self):
        self.complete()
        command = [harness.BINARY, 'run', '-m', self.model, '-p', WORDS, '-n', '600', '--temp', '0', '-c', '2048', '--ignore-eos',
                   '--kv-cache-dir', self.dir]
        first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        first.stdout.read(len(WORDS))  # it is under way
        first.send_signal(signal.SIGSTOP)
        second = self.complete()
        first.send_signal(signal.SIGCONT)
        first.communicate()
        self.assertIn('in use by another process', second.err)
        self.check_restored(self.complete(), second)

    def test_a_context_larger_than_memory(self):
        for split in ([], ['--tp', 2, '--in-process'], ['--pp', 2, '--in-process']):
            roomy = self.complete('--ignore-eos', *split, cached=False, n=400)
            result = self.complete('--ignore-eos', *split, '--kv-tokens', 768, '--kv-disk', '64M', cached=False, n=400)
            self.assertEqual(result.out, roomy.out)
            self.assertRegex(result.err, r'KV pages on disk: [1-9]\d* written, \d+ read back, 0 lost; read [1-9]')
        # Kept pages begin the next one, though memory has no room for them.
        prompt = WORDS + ' the end'
        first = self.complete('--kv-tokens', 768, prompt=prompt)
        second = self.complete('--kv-tokens', 768, prompt=prompt)
        tokens, cached = self.cached_tokens(second)
        self.assertGreater(tokens, 1024)
        self.assertEqual(cached, (tokens - 1) // 256 * 256)
        self.assertEqual(second.out, first.out)
        self.assertEqual(first.out, self.complete(prompt=prompt, cached=False).out)
        # Less memory than a context, and no disk to make up for it.
        refused = harness.shoal('run', '-m', self.model, '-p', prompt, '-n', 1, '-c', 2048, '--kv-tokens', 768)
        self.assertEqual(refused.code, harness.USAGE, str(refused))
        self.assertIn('--kv-disk', refused.err)

    def test_limit_of_the_folder(self):
        plain = self.complete(cached=False)
        first = self.complete()
        file, = self.dir.glob('*.pages')
        size = file.stat().st_size
        other = harness.generate(self.scratch / 'other.gguf', '--dim', 256, '--layers', 4, '--heads', 4, '--kv-heads', 4,
                                 '--ffn', 512, '--vocab', 512, '--context', 2048, '--seed', 2)
        limit = ['--kv-cache-limit', size + size // 2]  # of both models together

        def complete_other():
            return self.assert_ok(harness.shoal('run', '-m', other, '-p', WORDS, '-n', 16, '--temp', 0, '-c', 2048,
                                                '--kv-cache-dir', self.dir, *limit))

        def taken():
            return sum(min(f.stat().st_blocks * 512, f.stat().st_size) for f in self.dir.glob('*.pages'))
        one = complete_other()
        self.assertNotIn('computed again', one.err)
        self.assertLessEqual(taken(), size + size // 2)
        two = complete_other()
        self.assertEqual(two.out, one.out)
        self.assertGreater(self.cached_tokens(two)[1], 600)
        # What was there first gave way in part, its oldest pages; that costs time and nothing else.
        again = self.complete(*limit)
        self.assertEqual(again.out, first.out)
        self.assertEqual(again.out, plain.out)
        self.assertLess(self.cached_tokens(again)[1], 600)
        self.assertLessEqual(taken(), size + size // 2)
        self.check_restored(self.complete(*limit), plain)

    def test_bad_flags(self):
        for flags in (['--kv-disk', 'much'], ['--kv-disk', '1K'], ['--kv-cache-limit', '1K'], ['--kv-cache-limit', 'much']):
            result = harness.shoal('run', '-p', 'a', '-n', 1, '--kv-cache-dir', self.dir, *flags)
            self.assertNotEqual(result.code, 0)
            self.assertIn(flags[0], result.err)
        result = harness.shoal('run', '-p', 'a', '-n', 1, '--kv-cache-limit', '1G')
        self.assertEqual(result.code, harness.USAGE, str(result))
        self.assertIn('--kv-cache-dir', result.err)
        blocked = self.scratch / 'file'
        blocked.write_text('')
        result = harness.shoal('run', '-p', 'a', '-n', 1, '--kv-cache-dir', blocked)
        self.assertNotEqual(result.code, 0)
        self.assertIn(str(blocked), result.err)


if __name__ == '__main__':
    harness.main()
