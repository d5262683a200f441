"""Greedy text and perplexity of a reference model are the same however it is placed.

golden_test.py in-process | mpi: ranks as threads of one process, or as processes under mpirun.
"""
import re
import sys
import unittest

import harness

PLACEMENTS = [(1, []), (2, ['--tp', 2]), (3, ['--tp', 3]), (4, ['--tp', 4]), (2, ['--pp', 2]), (5, ['--pp', 5]),
              (4, ['--tp', 2, '--pp', 2]), (2, ['--tp', 2, '--split', '3,1'])]
PERPLEXITY, PERPLEXITY_TOLERANCE = 3.978, 0.001
PROMPT = 'Once upon a time'
transport = 'in-process'


def place(ranks, command, *args, placement):
    """Runs a command of the binary on that many ranks over the chosen transport."""
    args = [*args, '--kv-type', 'f32']  # the references are computed without rounding the cache
    if transport == 'mpi':
        return harness.mpirun(ranks, command, *args, *placement, timeout=240)
    return harness.shoal(command, *args, '--in-process', *placement, timeout=240)


def golden_stories():
    """The reference text of stories260K after its prompt, and how many tokens were generated for it."""
    lines = (harness.STORIES.parent / 'golden_greedy.txt').read_text().split('\n')
    first = next(i for i, line in enumerate(lines) if line.startswith(PROMPT))
    last = next(i for i, line in enumerate(lines) if line.startswith('ids ['))
    ids = [int(i) for i in re.findall(r'\d+', lines[last])]
    return '\n'.join(lines[first:last]), len(ids) - 5  # beginning of sequence and four tokens are the prompt


def golden_demo():
    """(prompt, text) pairs of the demo model in F16."""
    text = (harness.SHARED_DATA / 'demo' / 'golden_greedy.txt').read_text()
    return [tuple(part.split('\n', 1)) for part in text.split('prompt: ')[1:]]


class GoldenTest(harness.TestCase):
    def test_greedy_text(self):
        expected, tokens = golden_stories()
        for ranks, placement in PLACEMENTS:
            with self.subTest(placement=placement):
                result = self.assert_ok(place(ranks, 'run', '-m', harness.STORIES, '-p', PROMPT, '-n', tokens, '--temp', 0,
                                              placement=placement))
                self.assertEqual(result.out.decode().strip(), expected.strip(), result.err)

    def test_perplexity(self):
        for ranks, placement in PLACEMENTS:
            with self.subTest(placement=placement):
                result = self.assert_ok(place(ranks, 'perplexity', '-m', harness.STORIES, '-c', 256, '-f',
                                              harness.SHARED_DATA / 'tinystories_ppl.txt', placement=placement))
                found = re.search(r'perplexity\D*([0-9.]+)', result.out.decode(), re.IGNORECASE)
                self.assertIsNotNone(found, str(result))
                self.assertAlmostEqual(float(found[1]), PERPLEXITY, delta=PERPLEXITY_TOLERANCE)

    def test_demo_model(self):
        for prompt, expected in golden_demo():
            with self.subTest(prompt=prompt):
                result = self.assert_ok(place(2, 'run', '-m', harness.SHARED_DATA / 'demo' / 'demo-f16.gguf', '-p', prompt,
                                              '-n', 200, '--temp', 0, placement=['--tp', 2]))
                self.assertIn(expected.strip(), result.out.decode())


if __name__ == '__main__':
    transport = sys.argv.pop(1)
    assert transport in ('in-process', 'mpi')
    harness.require_shared_data()
    harness.main()
