"""Models larger than the memory they may take: same answer, and clear words when something is wrong with the disk."""
import json
import os
import re
import shutil
import subprocess
import sys
import unittest

import harness
from harness import MALFORMED, OK, TOO_BIG

RAM = '166M'  # less than the model, more than the least that works
SMALL = ('-c', 128, '-b', 32, '-t', 1)

# Runs a command to which io_uring_setup (425 on every machine) is forbidden, as container runtimes do.
WITHOUT_IO_URING = '''
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
code = b''.join(struct.pack('<HBBI', *i) for i in (
    (0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7fff0000)))
class Program(ctypes.Structure):
    _fields_ = [('length', ctypes.c_ushort), ('code', ctypes.c_char_p)]
program = Program(len(code) // 8, code)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0, os.strerror(ctypes.get_errno())
os.execv(sys.argv[1], sys.argv[1:])
'''


class OffloadTest(harness.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = harness.tempfile.TemporaryDirectory(prefix='shoal-e2e-')
        cls.addClassCleanup(cls.folder.cleanup)
        folder = harness.pathlib.Path(cls.folder.name)
        cls.model = harness.generate(folder / 'm.gguf', '--dim', 1024, '--layers', 8, '--ffn', 4096)
        cls.shards = folder / 'shards'
        result = harness.shoal('shard', '-m', cls.model, '-o', cls.shards, '-q')
        assert result.code == OK, str(result)

    def ids(self, model, *flags, runner=harness.shoal):
        result = self.assert_ok(runner('run', '-m', model, '-p', 'abc', '-n', 8, '--temp', 0, '--print-ids', *SMALL,
                                       *flags))
        return result.out, result.err

    def copy(self):
        """A copy of the shards that a test may damage."""
        return harness.pathlib.Path(shutil.copytree(self.shards, self.scratch / 'shards'))

    def refused(self, code, model, *texts, ram=RAM):
        result = harness.shoal('run', '-m', model, '-p', 'abc', '-n', 1, '--ram', ram, *SMALL)
        self.assertEqual(result.code, code, str(result))
        for text in texts:
            self.assertIn(text, result.err)
        return result

    def flip(self, path, at):
        with open(path, 'r+b') as f:
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 0x40]))

    def test_the_answer_does_not_depend_on_memory(self):
        whole, _ = self.ids(self.model)
        for model, note in ((self.shards, ''), (self.model, 'faster: --disk-cache')):
            with self.subTest(model=model):
                streamed, err = self.ids(model, '--ram', RAM)
                self.assertEqual(streamed, whole)
                self.assertRegex(err, r'reads [1-9][\d.]* MB for each token')
                self.assertIn(note, err)

    def test_disk_cache(self):
        folder = self.scratch / 'cache'
        flags = ('--disk-cache', folder)
        for split in ((), ('--tp', 2, '--in-process'), ('--pp', 2, '--in-process')):
            with self.subTest(split=split):
                whole, _ = self.ids(self.model, *split)
                ram = '190M' if split else RAM
                for _ in range(2):
                    streamed, err = self.ids(self.model, *flags, *split, '--ram', ram)
                    self.assertEqual(streamed, whole)
                    self.assertRegex(err, r'reads [1-9][\d.]* MB for each token')
                    self.assertNotIn('packed', err)
        self.ids(self.model, '--disk-cache', self.scratch / 'unused')  # fits in memory
        self.assertFalse((self.scratch / 'unused').exists())

    def test_a_damaged_disk_cache_is_mended(self):
        whole, _ = self.ids(self.model)
        flags = ('--ram', RAM, '--disk-cache', self.scratch / 'cache')
        _, quiet = self.ids(self.model, *flags)
        self.assertNotIn('shoal:', quiet)
        rank, = self.scratch.glob('cache/*/rank-000.shard')
        size = rank.stat().st_size
        damages = [lambda: self.flip(rank, 5000),          # the embedding
                   lambda: self.flip(rank, size // 2),     # a layer
                   lambda: self.flip(rank, size - 500_000),
                   lambda: self.flip(rank, 9),             # the header
                   lambda: os.truncate(rank, size - 4096),
                   rank.unlink,
                   lambda: (rank.parent / 'manifest.json').write_text('{')]
        for number, damage in enumerate(damages):
            with self.subTest(damage=number):
                damage()
                got, err = self.ids(self.model, *flags)
                self.assertEqual(got, whole)
                if number < len(damages) - 1:
                    self.assertIn('shoal: ', err)
                self.assert_ok(harness.shoal('shard', '--verify', '-o', rank.parent, '-q'))

    def test_a_disk_cache_that_cannot_be(self):
        blocked = self.scratch / 'file'
        blocked.write_text('')
        got, err = self.ids(self.model, '--ram', RAM, '--disk-cache', blocked / 'x')
        self.assertEqual(got, self.ids(self.model)[0])
        self.assertIn('weights are packed again for each token', err)

    def test_limit_of_the_disk_cache(self):
        other = harness.generate(self.scratch / 'other.gguf', '--dim', 1024, '--layers', 8, '--ffn', 4096, '--seed', 2)
        folder = self.scratch / 'cache'
        size = sum(f.stat().st_size for f in self.shards.iterdir())
        flags = ('--ram', RAM, '--disk-cache', folder, '--disk-cache-limit', size * 3 // 2)  # of both models together

        def packed():
            return sorted(folder.glob('*/manifest.json'))
        whole, _ = self.ids(self.model)
        self.assertEqual(self.ids(self.model, *flags)[0], whole)
        first = packed()
        self.assertEqual(len(first), 1)
        # While that one is in use the other model gets no room, and an answer.
        serve = subprocess.Popen([harness.BINARY, 'serve', '-m', self.model, '--port', '0', *map(str, SMALL + flags)],
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            for line in serve.stdout:
                if 'is ready after' in line:
                    break
            _, err = self.ids(other, *flags)
            self.assertIn('used by running processes; weights are packed again for each token', err)
            self.assertEqual(packed(), first)
        finally:
            serve.terminate()
            serve.communicate()
        _, err = self.ids(other, *flags)
        self.assertNotIn('shoal:', err)
        self.assertEqual(len(packed()), 1)
        self.assertNotEqual(packed(), first)
        # Larger than the limit: said, and streamed from the GGUF.
        got, err = self.ids(self.model, '--ram', RAM, '--disk-cache', folder, '--disk-cache-limit', '1M')
        self.assertEqual(got, whole)
        self.assertIn('may take 1.00 MiB (--disk-cache-limit)', err)
        for bad in (['--disk-cache-limit', '1G'], ['--disk-cache', folder, '--disk-cache-limit', 'much'],
                    ['--disk-cache', folder, '--disk-cache-limit', '0']):
            result = harness.shoal('run', '-p', 'a', '-n', 1, *bad)
            self.assertEqual(result.code, harness.USAGE, str(result))
            self.assertIn('--disk-cache', result.err)

    def test_without_io_uring(self):
        script = self.scratch / 'without.py'
        script.write_text(WITHOUT_IO_URING)
        ids, err = self.ids(self.shards, '--ram', RAM, runner=lambda *args: harness.run(
            sys.executable, script, harness.BINARY, *args))
        self.assertEqual(ids, self.ids(self.shards)[0])
        self.assertIn('pread threads (io_uring refused: Operation not permitted)', err)

    def test_too_little_memory_says_what_is_enough(self):
        result = self.refused(TOO_BIG, self.shards, 'weights', 'at least, streamed', ram='48M')
        more = re.search(r'give it ([\d.]+) MiB more \(--ram\)', result.err)
        self.assertIsNotNone(more, result.err)
        # The process itself varies by a few pages.
        enough = 48 + float(more[1]) + 4
        self.ids(self.shards, '--ram', f'{enough}M')

    def test_what_is_enough_is_said_for_the_host(self):
        pair = ('--tp', 2, '--in-process')
        result = harness.shoal('run', '-m', self.model, '-p', 'abc', '-n', 1, '--ram', '48M', *SMALL, *pair)
        self.assertEqual(result.code, TOO_BIG, str(result))
        more = re.search(r'give the 2 ranks of this host together ([\d.]+) MiB more \(--ram\)', result.err)
        self.assertIsNotNone(more, result.err)
        self.ids(self.model, '--ram', f'{48 + float(more[1]) + 8}M', *pair)

    def test_truncated_file(self):
        shards = self.copy()
        rank = shards / 'rank-000.shard'
        os.truncate(rank, rank.stat().st_size - 4096)
        self.refused(MALFORMED, shards, 'rank-000.shard', 'was cut')

    def test_flipped_bytes(self):
        for name, place in (('token_embd.weight', 5000), ('', -2_000_000)):
            with self.subTest(place=place):
                shards = self.copy()
                rank = shards / 'rank-000.shard'
                self.flip(rank, place % rank.stat().st_size)
                result = self.refused(MALFORMED, shards, 'rank-000.shard', name, 'does not have its checksum',
                                      'shoal shard')
                self.assertEqual(result.out, b'')  # not even the prompt
                result = harness.shoal('shard', '--verify', '-o', shards, '-q')
                self.assertEqual(result.code, MALFORMED, str(result))
                shutil.rmtree(shards)

    def test_wrong_version(self):
        shards = self.copy()
        manifest = shards / 'manifest.json'
        manifest.write_text(re.sub(r'"version": *1\b', '"version": 2', manifest.read_text()))
        self.refused(MALFORMED, shards, 'format version 2, this program reads version 1')

    def test_a_manifest_of_something_else(self):
        shards = self.copy()
        (shards / 'manifest.json').write_text('{"version": 1}')
        self.refused(MALFORMED, shards, 'manifest.json is not of a shard directory')

    def test_manifest_of_another_model(self):
        other = harness.generate(self.scratch / 'other.gguf', '--dim', 1024, '--layers', 8, '--ffn', 4096, '--seed', 2)
        self.assert_ok(harness.shoal('shard', '-m', other, '-o', self.scratch / 'other', '-q'))
        shards = self.copy()
        for name in ('manifest.json', 'model.gguf'):
            shutil.copy(self.scratch / 'other' / name, shards / name)
        self.refused(MALFORMED, shards, 'belongs to another model')

    def test_full_disk_while_sharding(self):
        """A file system of 64 MB in a namespace of its own: refused in words; with more room the run goes on."""
        script = f'''
            mount -t tmpfs -o size=64m none {self.scratch} || exit 99
            {harness.BINARY} shard -m {self.model} -o {self.scratch}/s -q; echo "first $?"
            mount -o remount,size=400m {self.scratch}
            {harness.BINARY} shard -m {self.model} -o {self.scratch}/s -q; echo "second $?"
            {harness.BINARY} shard --verify -o {self.scratch}/s -q; echo "verified $?"'''
        result = harness.run('unshare', '-rm', 'sh', '-c', script)
        if result.code in (1, 99) and b'first' not in result.out:
            self.skipTest(f'no mount namespace here: {result.err}')
        self.assertEqual(result.out, f'first {TOO_BIG}\nsecond 0\nverified 0\n'.encode(), str(result))
        self.assertIn('make room', result.err)

    def test_plan(self):
        cache = {'XDG_CACHE_HOME': str(self.scratch)}

        def plan(*flags):
            result = harness.shoal('plan', '-m', self.shards, '-o', 'json', *SMALL, *flags, env=cache)
            self.assert_ok(result)
            return json.loads(result.out)

        first = plan('--ram', RAM)
        rank = first['ranks'][0]
        self.assertGreater(rank['disk_bytes_per_token'], 0)
        self.assertLess(rank['resident_bytes'] + rank['streaming_buffer_bytes'], rank['budget_bytes'])
        self.assertLess(rank['least_bytes'], rank['budget_bytes'])
        # The least that works does, and is said when there is less.
        self.ids(self.shards, '--ram', first['least_ram_bytes'])
        self.assertLess(first['least_ram_bytes'], 166 << 20)
        less = harness.shoal('plan', '-m', self.shards, '--ram', '58M', *SMALL, env=cache)
        self.assertEqual(less.code, TOO_BIG, str(less))
        said = int(re.search(r'the least that works is --ram (\d+)M for each host', less.err)[1])
        self.assertLess(abs(said - (first['least_ram_bytes'] >> 20)), 32)  # the process itself
        self.assertGreater(first['decode_tokens_per_s_with_one_more_gib'], first['decode_tokens_per_s'])
        self.assertEqual(plan('--ram', '4G')['ranks'][0]['disk_bytes_per_token'], 0)
        self.assertGreater(first['prefill_kv_bytes_per_s'], 0)
        # What KV pages on disk take of memory leaves less for weights, and does not count as context.
        paged = plan('--ram', RAM, '--kv-disk', '64M')['ranks'][0]
        self.assertGreater(paged['kv_disk_tokens'], 0)
        self.assertLess(paged['resident_bytes'], rank['resident_bytes'])
        self.assertLess(paged['context_max'], rank['context_max'])
        gpu = plan('--ram', '4G', '--vram', '100M')['ranks'][0]['gpu']
        self.assertLess(gpu['resident_bytes'], 100 << 20)
        self.assertGreater(gpu['memory_bytes_per_token'], 0)
        self.assertEqual(gpu['disk_bytes_per_token'], 0)
        small = harness.shoal('plan', '-m', self.shards, '--vram', '12M', *SMALL, env=cache)
        self.assertEqual(small.code, TOO_BIG, str(small))
        self.assertIn('--vram', small.err)
        # A GPU's kernels work in memory of their own size: 64 MiB of it are for cuBLAS, in batches of 256 and more.
        batches = ('-c', 512, '-b', 512, '-t', 1, '--ram', '4G')
        workspaces = []
        for device in (), ('--vram', '1G'):
            result = harness.shoal('plan', '-m', self.shards, '-o', 'json', *batches, *device, env=cache)
            self.assert_ok(result)
            workspaces.append(json.loads(result.out)['ranks'][0]['workspace_bytes'])
        self.assertLess(workspaces[0], 64 << 20)
        self.assertGreater(workspaces[1], 64 << 20)
        # What is remembered is used, but not for longer than a month.
        path = self.scratch / 'shoal' / 'machine.json'
        known = json.loads(path.read_text())
        # Two stages of a pipeline take turns with one disk, also when both have a part of a prompt.
        slow = {key: {**entry, 'read': 1e8} for key, entry in known.items()}
        path.write_text(json.dumps(slow))
        pair = plan('--ram', RAM, '--pp', 2, '--ranks-per-host', 2)
        read_s = sum(r['disk_bytes_per_token'] for r in pair['ranks']) / 1e8
        self.assertGreater(read_s, 0.2)
        self.assertLess(pair['prefill_tokens_per_s'], 32 / read_s * 1.01)
        self.assertTrue(all(os.uname().nodename in key for key in known), known.keys())  # hosts may share a home
        for entry in known.values():
            entry['decode'] = 12345.0
        path.write_text(json.dumps(known))
        self.assertEqual(round(plan('--ram', RAM)['decode_bytes_per_s']), 12345)
        for entry in known.values():
            entry['date'] = '2020-02-02'
        path.write_text(json.dumps(known))
        again = plan('--ram', RAM)
        self.assertGreater(again['decode_bytes_per_s'], 12345 * 2)
        self.assertEqual(again['measured'], first['measured'])


if __name__ == '__main__':
    harness.main()
