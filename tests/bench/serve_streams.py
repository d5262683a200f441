#!/usr/bin/env python3
"""A thousand open streams: none is dropped, what one costs in memory, and whether the engine is as fast as with 16.

serve_streams.py [-m MODEL] [--streams 1000] [-n 40] [--busy 16] [--flags ...]: starts a server of its own with `--parallel BUSY`. First
BUSY clients at a time stream n tokens each, STREAMS requests in all; then all STREAMS requests are sent at once: BUSY decode, the
others wait with their streams open. Every stream must end with [DONE] and its n tokens. Memory of a waiting stream: what the
coordinator and the engine grew by while all were open. One thread, standard library only.
"""
import argparse
import asyncio
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / 'e2e'))
import serve_harness


def rss_kb(pid):
    for line in pathlib.Path(f'/proc/{pid}/status').read_text().splitlines():
        if line.startswith('VmRSS:'):
            return int(line.split()[1])
    return 0


async def stream(port, number, n, opened):
    """Tokens of one stream that ended as it should; 0 otherwise."""
    reader, writer = await asyncio.open_connection('127.0.0.1', port, limit=1 << 20)
    try:
        body = json.dumps({'prompt': f'Story {number}', 'max_tokens': n, 'temperature': 0, 'stream': True, 'ignore_eos': True,
                           'stream_options': {'include_usage': True}}).encode()
        writer.write(f'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
                     f'Content-Length: {len(body)}\r\nConnection: close\r\n\r\n'.encode() + body)
        status = await reader.readline()
        if b' 200 ' not in status:
            raise RuntimeError(f'{status!r} {(await reader.read(2000))!r}')
        opened()
        usage = b''
        while line := await reader.readline():
            if b'"usage":{' in line:
                usage = line
            if line.startswith(b'data: [DONE]'):
                return json.loads(usage[6:])['usage']['completion_tokens']
        return 0
    finally:
        writer.close()


async def run(server, streams, at_once, n, offset):
    """(tokens per second, KB that the server's processes grew by while all were open), for `streams` requests."""
    pids = [server.process.pid] + server.ranks()
    before, peak, open_now = sum(map(rss_kb, pids)), 0, 0
    numbers, tokens = iter(range(streams)), []

    def opened():
        nonlocal open_now, peak
        open_now += 1
        if open_now == streams:
            peak = sum(map(rss_kb, pids)) - before

    async def client():
        for i in numbers:
            tokens.append(await stream(server.port, offset + i, n, opened))

    began = time.monotonic()
    await asyncio.gather(*(client() for _ in range(at_once)))
    seconds = time.monotonic() - began
    short = [t for t in tokens if t != n]
    if short or len(tokens) != streams:
        raise SystemExit(f'{len(short)} of {len(tokens)} streams were not complete: {short[:10]}')
    return sum(tokens) / seconds, peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-m')
    parser.add_argument('--streams', type=int, default=1000)
    parser.add_argument('--busy', type=int, default=16)
    parser.add_argument('-n', type=int, default=40)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--flags', nargs=argparse.REMAINDER, default=[])
    args = parser.parse_args()
    server = serve_harness.Server('--parallel', args.busy, '--max-requests', args.streams + args.busy, '-q', *args.flags, model=args.m)
    try:
        asyncio.run(run(server, 2 * args.busy, args.busy, args.n, 10**6))  # warm
        for i in range(args.rounds):
            few, _ = asyncio.run(run(server, args.streams, args.busy, args.n, 2 * i * args.streams))
            many, kb = asyncio.run(run(server, args.streams, args.streams, args.n, (2 * i + 1) * args.streams))
            print(f'{args.busy} at a time: {few:.1f} tokens/s; {args.streams} at once: {many:.1f} ({100 * (many / few - 1):+.1f} %), '
                  f'{kb / args.streams:.1f} KB for each, none dropped', flush=True)
    finally:
        server.kill()


if __name__ == '__main__':
    main()
