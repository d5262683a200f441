#!/usr/bin/env python3
"""Mixed load with disconnects for a long time: memory and speed at the end against the beginning.

serve_soak.py [MINUTES] [STREAMS]: starts a server of its own on the demo model, keeps STREAMS clients busy (whole answers, streams,
streams that are left after a few tokens, bad requests, JSON schemas), prints a line each half minute, and fails when the
coordinator's or the engine's memory grew by more than 10 % (and 8 MB) after the first minute or the speed fell by more than 15 %.
"""
import json
import pathlib
import random
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / 'e2e'))
import harness
import serve_harness

MINUTES = float(sys.argv[1]) if len(sys.argv) > 1 else 60
STREAMS = int(sys.argv[2]) if len(sys.argv) > 2 else 12
SCHEMA = {'type': 'object', 'properties': {'a': {'type': 'integer'}, 'b': {'type': 'string', 'maxLength': 20}}, 'required': ['a', 'b']}


def rss_mb(pid):
    for line in pathlib.Path(f'/proc/{pid}/status').read_text().splitlines():
        if line.startswith('VmRSS:'):
            return int(line.split()[1]) / 1024
    return 0


def client(server, stop, failures):
    rng = random.Random()
    while not stop.is_set():
        body = {'prompt': rng.choice(['Once', 'The fish', 'A boat']) + ' ' + str(rng.randrange(1000)), 'max_tokens': rng.randrange(5, 120)}
        try:
            kind = rng.randrange(10)
            if kind == 0:
                server.request('POST', '/v1/completions', b'{"prompt": ' + b'[' * rng.randrange(1000))
            elif kind == 1:
                server.post('/v1/completions', {**body, 'response_format': {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': SCHEMA}}})
            elif kind < 5:
                server.post('/v1/completions', body)
            else:
                leave = rng.randrange(1, 30) if kind < 8 else 10**9
                for i, event in enumerate(server.stream('/v1/completions', body)):
                    if i > leave:
                        break
        except (OSError, AssertionError, json.JSONDecodeError) as e:
            failures.append(repr(e))


def main():
    server = serve_harness.Server('--parallel', 8, '-q')
    stop, failures = threading.Event(), []
    threads = [threading.Thread(target=client, args=(server, stop, failures), daemon=True) for _ in range(STREAMS)]
    for t in threads:
        t.start()
    samples, began = [], time.monotonic()

    def generated():
        text = server.request('GET', '/metrics')[2].decode()
        return float(next(line.split()[1] for line in text.splitlines() if line.startswith('shoal_generation_tokens_total')))

    try:
        count, at = generated(), time.monotonic()
        while time.monotonic() - began < MINUTES * 60:
            time.sleep(min(30, MINUTES * 60 / 4))
            now, total = time.monotonic(), generated()
            engine = server.ranks()[0]
            samples.append((rss_mb(server.process.pid), rss_mb(engine), (total - count) / (now - at)))
            count, at = total, now
            print(f'{(now - began) / 60:6.1f} min: coordinator {samples[-1][0]:7.1f} MB, engine {samples[-1][1]:7.1f} MB, '
                  f'{samples[-1][2]:8.1f} tokens/s, restarts {server.status()["restarts"]}, failures {len(failures)}', flush=True)
    finally:
        stop.set()
        code = server.stop(60)
    third = max(1, len(samples) // 3)
    first, last = samples[min(2, len(samples) - 1)], samples[-1]
    for i, name in ((0, 'coordinator'), (1, 'engine')):
        assert last[i] < first[i] * 1.1 + 8, f'{name} grew from {first[i]:.1f} to {last[i]:.1f} MB'
    speed = [sum(s[2] for s in part) / len(part) for part in (samples[:third], samples[-third:])]
    assert speed[1] > 0.85 * speed[0], f'{speed[0]:.1f} tokens/s fell to {speed[1]:.1f}'
    assert not failures, failures[:5]
    assert code == 0, code
    print('flat memory, same speed')


if __name__ == '__main__':
    main()
