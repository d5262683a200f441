"""The engine is killed, stopped and left without memory under streams: each pauses, continues, and equals the undisturbed text.

serve_fault_test.py [ROUNDS]: rounds of the chaos test, each with the next of three causes (default 3); 300 for a thorough run.
"""
import random
import resource
import signal
import sys
import threading
import time

import harness
import serve_harness

ROUNDS = int(sys.argv.pop()) if len(sys.argv) > 1 and sys.argv[-1].isdigit() else 3
PROMPTS = ['Once upon a time', 'The fish', 'A little boy', 'In the sea', 'One day', 'Tom and Mia']
# Every allocation of a KiB asks the kernel, so that a process that may have no more memory notices soon.
FRUGAL = {'MALLOC_MMAP_THRESHOLD_': '1024', 'MALLOC_TRIM_THRESHOLD_': '0', 'MALLOC_TOP_PAD_': '0'}


def exhaust_memory(pid):
    """Whatever the process wants to allocate from now on fails."""
    resource.prlimit(pid, resource.RLIMIT_AS, (1, resource.RLIM_INFINITY))


CAUSES = {'killed': harness.kill, 'stopped': lambda pid: harness.kill(pid, signal.SIGSTOP), 'out of memory': exhaust_memory}
BODY = {'temperature': 0, 'max_tokens': 400, 'ignore_eos': True}


class Client(threading.Thread):
    """Reads one stream and notes when its tokens came."""

    def __init__(self, server, prompt, **fields):
        super().__init__(daemon=True)
        self.server, self.body = server, {**BODY, 'prompt': prompt, **fields}
        self.text, self.error, self.longest_gap, self.events, self.ended = '', None, 0.0, 0, False
        self.start()

    def run(self):
        try:
            last = time.monotonic()
            for event in self.server.stream('/v1/completions', self.body):
                now = time.monotonic()
                self.longest_gap, last = max(self.longest_gap, now - last), now
                if event == '[DONE]':
                    self.ended = True
                    return
                self.text += serve_harness.text_of([event])
                self.events += 1
        except Exception as e:  # the test reports it
            self.error = e


class ServeFaultTest(harness.TestCase):
    FLAGS = ()

    def setUp(self):
        super().setUp()
        self.server = serve_harness.Server('--parallel', 4, *self.FLAGS, env=FRUGAL)
        self.addCleanup(self.server.kill)
        self.expected = {p: self.server.complete(p, **{k: v for k, v in BODY.items() if k != 'temperature'}) for p in PROMPTS}

    def disturb(self, rounds):
        gaps = {cause: [] for cause in CAUSES}
        for i in range(rounds):
            cause = list(CAUSES)[i % len(CAUSES)]
            clients = [Client(self.server, p) for p in PROMPTS]
            harness.wait_until(lambda: sum(c.events for c in clients) > random.randint(5, 600) or
                               all(c.ended for c in clients), 60, 'tokens')
            victim = random.choice(self.server.ranks())
            restarts = self.server.status()['restarts']
            began = time.monotonic()
            CAUSES[cause](victim)
            for c in clients:
                c.join(90)
                self.assertIsNone(c.error, self.server.log())
                self.assertTrue(c.ended, f'round {i}, {cause}: a stream hangs\n{self.server.log()}')
                self.assertEqual(c.text, self.expected[c.body['prompt']], f'round {i}, {cause}')
            gaps[cause].append(max(c.longest_gap for c in clients))
            # Streams that had ended before do not notice a rank that does nothing any more: the next ones do.
            while self.server.status()['restarts'] == restarts:
                if cause == 'out of memory' and time.monotonic() - began > 5:
                    harness.kill(victim)  # it happens to need no more memory
                self.assertLess(time.monotonic() - began, 120, f'round {i}, {cause}: not noticed\n{self.server.log()}')
                self.assertEqual(self.server.complete(PROMPTS[0], max_tokens=400, ignore_eos=True), self.expected[PROMPTS[0]])
            harness.wait_until(lambda: self.server.state() == 'ready', 60, 'the engine to be restarted')
            if rounds <= 10:
                print(f'round {i}: {cause}, longest gap {gaps[cause][-1]:.2f} s, recovered in {time.monotonic() - began:.2f} s',
                      flush=True)
        for cause, seconds in gaps.items():
            seconds.sort()
            if seconds:
                print(f'{cause}: {len(seconds)} rounds, longest gap in a stream p50 {seconds[len(seconds) // 2]:.2f} s, '
                      f'p99 {seconds[int(0.99 * (len(seconds) - 1))]:.2f} s', flush=True)

    def test_streams_survive(self):
        self.disturb(ROUNDS)

    def test_sampled_text_survives_too(self):
        fields = {'temperature': 1.0, 'seed': 5, 'stop': ['qqq']}
        undisturbed = Client(self.server, 'Once', **fields)
        undisturbed.join(60)
        client = Client(self.server, 'Once', **fields)
        harness.wait_until(lambda: client.events > 20, 60, 'tokens')
        harness.kill(self.server.ranks()[0])
        client.join(60)
        self.assertEqual((client.error, client.ended), (None, True))
        self.assertEqual(client.text, undisturbed.text)

    def test_client_that_leaves_is_cancelled_everywhere(self):
        streams = [self.server.stream('/v1/completions', {**BODY, 'prompt': 'x', 'max_tokens': 480}) for _ in range(12)]
        for s in streams[:4]:  # decoding; the others wait
            next(s)
        for s in streams:
            s.close()
        harness.wait_until(lambda: self.server.status()['unfinished'] == 0, 20, 'the requests to be cancelled')
        harness.wait_until(lambda: self.server.status()['running'] == 0, 20, 'the engine to be idle')
        self.assertEqual(self.server.complete('Once upon a time', max_tokens=5),
                         self.server.complete('Once upon a time', max_tokens=5))


class ServeMpiFaultTest(ServeFaultTest):
    """The same with ranks that are processes of an MPI job."""
    FLAGS = ('--tp', 2)


class ServePipelineFaultTest(ServeFaultTest):
    """In a pipeline, with tokens guessed ahead."""
    FLAGS = ('--pp', 2, '--draft-max', 7)


class ServeFailureTest(harness.TestCase):
    def test_memory_is_named_when_it_runs_out(self):
        server = serve_harness.Server('--parallel', 2, env=FRUGAL)
        self.addCleanup(server.kill)
        expected = server.complete(PROMPTS[0], max_tokens=400, ignore_eos=True)
        client = Client(server, PROMPTS[0])
        harness.wait_until(lambda: client.events > 5, 60, 'tokens')
        for rank in server.ranks():
            exhaust_memory(rank)
        client.join(60)
        self.assertEqual((client.error, client.ended, client.text), (None, True, expected), server.log())
        for n in range(1, 9):  # in case the rest needed no more memory: two at once and longer ones do
            if 'exit code 3 (out of memory)' in server.log():
                break
            more = [Client(server, p * n) for p in PROMPTS[:2]]
            for m in more:
                m.join(60)
        harness.wait_until(lambda: 'exit code 3 (out of memory)' in server.log(), 10, 'the reason in the log\n' + server.log())
        self.assertIn('engine: shoal: out of memory', server.log())
        self.assertNotIn('terminate', server.log())

    def test_engine_that_keeps_failing(self):
        """After some deaths in a row nobody waits any more: 503 at once, until an engine lives again."""
        server = serve_harness.Server('--parallel', 2)
        self.addCleanup(server.kill)
        expected = server.complete(PROMPTS[0], max_tokens=20)

        def fails_again():
            for rank in server.ranks():
                harness.kill(rank)
            return server.state() == 'failed'

        harness.wait_until(fails_again, 90, 'the server to call it a failure')
        self.assertEqual(server.request('GET', '/health/ready')[0], 503)
        status, headers, _ = server.request('POST', '/v1/completions', {'prompt': 'x'})
        self.assertEqual(status, 503)
        self.assertGreaterEqual(int(headers['Retry-After']), 1)
        harness.wait_until(lambda: server.state() == 'ready', 60, 'the engine to come back')
        self.assertEqual(server.complete(PROMPTS[0], max_tokens=20), expected)


if __name__ == '__main__':
    harness.main()
