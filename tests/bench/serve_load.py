#!/usr/bin/env python3
"""Load on an OpenAI-compatible server: N streams at once, their speed and their waits.

serve_load.py URL [-c 1,4,16,64] [-n 64] [--prompt-tokens 32] [--rounds 2] [--json]

Each level keeps c streams open until c * rounds requests are done, with greedy text of exactly n tokens (ignore_eos), and prints
tokens per second over all, time to the first token (p50, p99) and between tokens (p99). Standard library only, one thread, so that
the client takes little of the cores it shares with the server. Every stream must end with [DONE] and its n tokens.
"""
import argparse
import asyncio
import json
import time
import urllib.parse

WORDS = 'the little fish swam over to a big red boat and said hello my friend do you want to play with me today'.split()


def prompt(i, words):
    """Different from its neighbours from the first word on, so that no prefix is shared."""
    return f'Story {i}: ' + ' '.join(WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)] for k in range(words))


class Request:
    def __init__(self):
        self.first = self.last = None
        self.gaps, self.tokens, self.done = [], 0, False


async def stream(url, body, result):
    reader, writer = await asyncio.open_connection(url.hostname, url.port, limit=1 << 20)
    try:
        data = json.dumps(body).encode()
        writer.write(f'POST /v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n'
                     f'Content-Length: {len(data)}\r\nConnection: close\r\n\r\n'.encode() + data)
        result.began = time.perf_counter()
        status = await reader.readline()
        if b' 200 ' not in status:
            raise RuntimeError(f'{status!r} {(await reader.read(2000))!r}')
        while line := await reader.readline():
            if not line.startswith(b'data: '):
                continue
            if line.startswith(b'data: [DONE]'):
                result.done = True
                break
            if b'"error"' in line[:20]:
                raise RuntimeError(line.decode())
            now = time.perf_counter()
            chunk = json.loads(line[6:])
            if chunk.get('usage'):
                result.tokens = chunk['usage']['completion_tokens']
            if not chunk.get('choices') or not chunk['choices'][0].get('text'):
                continue
            if result.first is None:
                result.first = now
            else:
                result.gaps.append(now - result.last)
            result.last = now
    finally:
        writer.close()
    return result


def percentile(values, p):
    values = sorted(values)
    return values[min(len(values) - 1, int(p * len(values)))] if values else float('nan')


async def level(url, streams, args):
    total, results, number = streams * args.rounds, [], iter(range(streams * args.rounds))

    async def worker():
        for i in number:
            body = {'prompt': prompt(args.first + i + 1000 * streams, args.prompt_tokens), 'max_tokens': args.n, 'temperature': 0, 'stream': True,
                    'ignore_eos': True, 'stream_options': {'include_usage': True}, 'cache_prompt': False}
            results.append(await stream(url, body, Request()))

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(streams)))
    seconds = time.perf_counter() - began
    assert len(results) == total
    short = [r.tokens for r in results if not r.done or r.tokens != args.n]
    if short:
        raise SystemExit(f'{len(short)} of {total} streams were not complete: {short[:10]}')
    first = [r.first - r.began for r in results if r.first]
    gaps = [g for r in results for g in r.gaps]
    return {'streams': streams, 'tokens_per_second': sum(r.tokens for r in results) / seconds,
            'first_token_p50_ms': 1e3 * percentile(first, .5), 'first_token_p99_ms': 1e3 * percentile(first, .99),
            'inter_token_p99_ms': 1e3 * percentile(gaps, .99)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('url')
    parser.add_argument('-c', default='1,4,16,64')
    parser.add_argument('-n', type=int, default=64)
    parser.add_argument('--prompt-tokens', type=int, default=32)
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--first', type=int, default=0, help='number of the first prompt: another one for each run, or a server '
                        'that keeps prefixes has computed them before (cache_prompt is sent, but not every server knows it)')
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    url = urllib.parse.urlsplit(args.url)
    if not args.json:
        print(f'{"streams":>8} {"tokens/s":>10} {"first p50":>10} {"first p99":>10} {"inter p99":>10}   (ms)')
    for c in map(int, args.c.split(',')):
        r = asyncio.run(level(url, c, args))
        print(json.dumps(r) if args.json else
              f'{c:8d} {r["tokens_per_second"]:10.1f} {r["first_token_p50_ms"]:10.1f} {r["first_token_p99_ms"]:10.1f} '
              f'{r["inter_token_p99_ms"]:10.1f}', flush=True)


if __name__ == '__main__':
    main()
