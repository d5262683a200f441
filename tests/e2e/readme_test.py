"""Every command of README.md runs as printed, except for the names of the reader's own files and machines."""
import re
import unittest

import harness

README = (harness.ROOT / 'README.md').read_text()


def blocks(text):
    """The contents of the fenced bash blocks, with the line they begin at."""
    return [(text[:m.start()].count('\n') + 1, m[1]) for m in re.finditer(r'^```bash\n(.*?)^```$', text, re.M | re.S)]


class ReadmeTest(harness.TestCase):
    def substitutions(self):
        """What stands for the reader's own things, and for what this very run is part of."""
        model = harness.generate(self.scratch / 'model.gguf', '--dim', 512, '--layers', 6, '--ffn', 1536)
        words = self.scratch / 'text.txt'
        words.write_text('The sea is deep and wide.\n' * 100)
        return {
            r'\bmodel\.gguf\b': str(model),
            r'\btext\.txt\b': str(words),
            r'\bhosts\b': str(self.scratch / 'hosts'),
            r'\bshards\b': str(self.scratch / 'shards'),
            r'(?<=--kv-cache-dir )\S+': str(self.scratch / 'kv'),
            r'pc[0-9]+ slots=1\b': 'localhost',  # Open MPI counts a host that is listed twice as two slots
            r'^tests/run\b.*$': 'tests/run --help',
            r'^deploy/quickstart\b.*$': '',  # quickstart_test.py runs it
            r'\bbuild/shoal\b': harness.BINARY,
            r'\b8080\b': str(harness.reserve_ports(2)),
            r'^kill %1$': 'kill $!; wait',
        }

    def test_every_fence_is_known(self):
        """A block in another notation would escape this test."""
        fences = re.findall(r'^```(\w*)$', README, re.M)
        self.assertEqual(len(fences) % 2, 0)
        self.assertLessEqual(set(fences[0::2]), {'bash', 'text'})

    def test_begins_with_the_two_commands(self):
        self.assertEqual([line.split('#')[0].strip() for line in blocks(README)[0][1].strip().split('\n')],
                         ['deploy/quickstart', 'tests/run'])

    def test_commands(self):
        table = self.substitutions()
        for line, block in blocks(README):
            with self.subTest(line=line):
                # Nothing outlives a block that fails half-way.
                script = "trap 'kill $(jobs -p) 2> /dev/null || :' EXIT\n" + block
                for pattern, replacement in table.items():
                    script = re.sub(pattern, replacement, script, flags=re.M)
                result = harness.run('bash', '-euo', 'pipefail', '-c', script, timeout=300)
                self.assertEqual(result.code, 0, f'README.md line {line}:\n{script}\n{result}')

    def test_files_that_it_links_to_exist(self):
        for target in re.findall(r'\]\(([^)#:]+)\)', README):
            self.assertTrue((harness.ROOT / target).exists(), target)


if __name__ == '__main__':
    unittest.main(verbosity=2)
