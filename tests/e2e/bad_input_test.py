"""Whatever is wrong with the input, the answer is one clear message on stderr and the exit code of its class."""
import pathlib
import random
import struct
import unittest

import harness
from harness import DEMO_MODEL, MALFORMED, OK, TOO_BIG, UNREADABLE, USAGE


def header_bytes(data):
    """Where the tensor data begins: everything before is parsed, so that is where damage must be noticed."""
    at = data.rindex(b'output_norm.weight') if data.rindex(b'output_norm.weight') < 200_000 else 0
    return at + 64


class BadInputTest(harness.TestCase):
    def refused(self, code, *args, names=''):
        """The binary must end with this code, say something on stderr that names the culprit, and print no text."""
        result = harness.shoal('run', *args, timeout=60)
        self.assertEqual(result.code, code, f'{args}\n{result}')
        self.assertEqual(result.out, b'', f'{args}: a refused run prints nothing on stdout')
        self.assertTrue(result.err.strip(), f'{args}: nothing on stderr')
        self.assertIn(str(names), result.err, f'{args}: the message does not name the culprit')
        return result

    def file(self, data, name='model.gguf'):
        path = self.scratch / name
        path.write_bytes(data)
        return path

    def test_no_file(self):
        path = self.scratch / 'absent.gguf'
        self.refused(UNREADABLE, '-m', path, '-p', 'x', names=path)

    def test_directory(self):
        self.refused(UNREADABLE, '-m', self.scratch, '-p', 'x', names=self.scratch)

    def test_empty_file(self):
        path = self.file(b'')
        self.refused(MALFORMED, '-m', path, '-p', 'x', names=path)

    def test_unknown_command(self):
        result = harness.shoal('frobnicate', '-m', 'x')
        self.assertEqual(result.code, USAGE, str(result))
        self.assertIn("'frobnicate' is not a command", result.err)

    def test_not_a_model(self):
        path = self.file(b'This is a letter, not a model.\n' * 100)
        self.refused(MALFORMED, '-m', path, '-p', 'x', names=path)

    def test_prefixes(self):
        """A download that broke off, at every kind of place."""
        data = DEMO_MODEL.read_bytes()
        for size in (1, 4, 8, 23, 24, 25, 100, 1000, 20_000, len(data) // 2, len(data) - 1):
            with self.subTest(bytes=size):
                path = self.file(data[:size])
                self.refused(MALFORMED, '-m', path, '-p', 'x', names=path)

    def test_huge_counts(self):
        """Counts from the file must be checked before anything is sized by them."""
        for tensors, keys in ((1 << 62, 1), (1, 1 << 62), (1 << 31, 1 << 31), ((1 << 64) - 1, (1 << 64) - 1)):
            with self.subTest(tensors=tensors, keys=keys):
                path = self.file(b'GGUF' + struct.pack('<IQQ', 3, tensors, keys) + b'\0' * 4096)
                self.refused(MALFORMED, '-m', path, '-p', 'x', names=path)

    def test_flipped_bytes(self):
        """One damaged byte in the header: the run is refused in words or works; it never crashes and never hangs."""
        data = DEMO_MODEL.read_bytes()
        rng = random.Random(20)
        # The first kilobytes hold the counts and the model's shape, the end of the header the tensor list.
        end = header_bytes(data)
        places = [rng.randrange(0, 1200) for _ in range(30)] + [rng.randrange(end - 2500, end) for _ in range(30)]
        for place in places:
            with self.subTest(place=place):
                damaged = bytearray(data)
                damaged[place] ^= 1 << rng.randrange(8)
                result = harness.shoal('run', '-m', self.file(bytes(damaged)), '-p', 'x', '-n', 2, timeout=60)
                self.assertIn(result.code, (OK, TOO_BIG, MALFORMED), str(result))
                if result.code:
                    self.assertTrue(result.err.strip())

    def test_usage(self):
        for args in (['-c', '0'], ['-c', 'many'], ['--tp', '99'], ['--tp', '0'], ['--pp', '99'], ['--split', '1,0'],
                     ['--split', '1,x'], ['--split', '1,-1'], ['--temp', '-1'], ['--top-p', '2'], ['-t', '-1'],
                     ['--no-such-flag']):
            with self.subTest(args=args):
                self.refused(USAGE, '-m', DEMO_MODEL, '-p', 'x', '-n', 1, *args, names=args[-1].lstrip('-'))

    def test_text_that_cannot_be_read(self):
        for flag, command in (('-f', 'run'), ('--batch-file', 'run'), ('-f', 'perplexity')):
            for path, reason in ((self.scratch, 'Is a directory'), (self.scratch / 'absent', 'No such file')):
                with self.subTest(command=command, flag=flag, path=path):
                    result = harness.shoal(command, '-m', DEMO_MODEL, flag, path, timeout=60)
                    self.assertEqual(result.code, UNREADABLE, str(result))
                    self.assertEqual(result.out, b'')
                    self.assertIn(str(path), result.err)
                    self.assertIn(reason, result.err)

    def test_prompt_longer_than_the_context(self):
        self.refused(USAGE, '-m', DEMO_MODEL, '-c', 64, '-n', 4, '-p', 'the sea is deep and ' * 100, names='64')

    def test_prompt_that_is_not_utf8(self):
        """Bytes are bytes: the vocabulary has all of them."""
        result = harness.shoal('run', '-m', DEMO_MODEL, '-n', 4, '--temp', 0, '-p', b'\xff\xfe Once\xc3'.decode(
            'utf-8', 'surrogateescape'))
        self.assertEqual(result.code, OK, str(result))

    def test_until_the_end(self):
        """-n -1 generates until the model ends or the context is full."""
        result = harness.shoal('run', '-m', DEMO_MODEL, '-n', -1, '--temp', 0, '-c', 512, '-p', 'Once upon a time')
        self.assertEqual(result.code, OK, str(result))
        self.assertRegex(result.out, rb'small fish.*\.\n$')


if __name__ == '__main__':
    harness.main()
