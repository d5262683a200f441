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
PROMPT, PROMPT_TOKENS = 'Once upon a time', 5  # with the beginning of the sequence
transport = 'in-process'


def place(ranks, command, *args, placement):
    """Runs a command of the binary on that many ranks over the chosen transport."""
    args = [*args, '--kv-type', 'f32']  # the references are computed without rounding the cache
    if transport == 'mpi':
        return harness.mpirun(ranks, command, *args, *placement, timeout=240)
    return harness.shoal(command, *args, '--in-process', *placement, timeout=240)


def golden_stories():
    """The reference text and ids of stories260K."""
    lines = (harness.STORIES.parent / 'golden_greedy.txt').read_text().split('\n')
    first = next(i for i, line in enumerate(lines) if line.startswith(PROMPT))
    last = next(i for i, line in enumerate(lines) if line.startswith('ids ['))
    ids = [int(i) for i in re.findall(r'\d+', lines[last])]
    return '\n'.join(lines[first:last]), ids


def golden_demo():
    """(prompt, text) pairs of the demo model in F16."""
    text = (harness.SHARED_DATA / 'demo' / 'golden_greedy.txt').read_text()
    return [tuple(part.split('\n', 1)) for part in text.split('prompt: ')[1:]]


class GoldenTest(harness.TestCase):
    def test_greedy_ids(self):
        text, ids = golden_stories()
        args = ['run', '-m', harness.STORIES, '-p', PROMPT, '--temp', 0, '-n', len(ids) - PROMPT_TOKENS]
        for ranks, placement in PLACEMENTS:
            with self.subTest(placement=placement):
                result = self.assert_ok(place(ranks, *args, '--print-ids', placement=placement))
                self.assertEqual([int(i) for i in result.out.split()], ids, result.err)
        result = self.assert_ok(place(1, *args, placement=[]))
        self.assertEqual(result.out.decode().strip(), text.strip())

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
                                              '-n', 200, '--temp', 0, '--special', '--no-display-prompt',
                                              placement=['--tp', 2]))
                self.assertEqual(result.out.decode().strip(), expected.strip())


if __name__ == '__main__':
    transport = sys.argv.pop(1)
    assert transport in ('in-process', 'mpi')
    harness.require_shared_data()
    harness.main()
