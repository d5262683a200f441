#!/usr/bin/env python3
"""How much sooner the second turn of a long conversation answers its first token, as its beginning is in the prefix cache.

serve_prefix.py URL [--tokens 2000] [--turns 5]: for each of several conversations a first turn of that many tokens, then a second that
goes on from it with 20 more. Prints both times to the first token. Standard library only.
"""
import argparse
import http.client
import json
import statistics
import time
import urllib.parse

WORDS = 'the little fish swam over to a big red boat and said hello my friend do you want to play with me today'.split()


def post(url, path, body):
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=600)
    connection.request('POST', path, json.dumps(body), {'Content-Type': 'application/json'})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f'{response.status}: {response.read()!r}')
    return connection, response


def tokenize(url, text):
    connection, response = post(url, '/tokenize', {'content': text})
    ids = json.loads(response.read())['tokens']
    connection.close()
    return ids


def turn(url, tokens):
    """(seconds to the first token, cached tokens)"""
    began = time.perf_counter()
    connection, response = post(url, '/v1/completions', {'prompt': tokens, 'max_tokens': 2, 'temperature': 0, 'stream': True,
                                                         'ignore_eos': True, 'stream_options': {'include_usage': True}})
    first, cached = None, 0
    for line in response:
        if line.startswith(b'data: {'):
            first = first or time.perf_counter() - began
            usage = json.loads(line[6:]).get('usage') or {}
            cached = (usage.get('prompt_tokens_details') or {}).get('cached_tokens', cached)
    connection.close()
    return first, cached


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('url')
    parser.add_argument('--tokens', type=int, default=2000)
    parser.add_argument('--turns', type=int, default=5)
    args = parser.parse_args()
    url = urllib.parse.urlsplit(args.url)
    firsts, seconds = [], []
    for i in range(args.turns):
        text = f'Story {i}: ' + ' '.join(WORDS[(i * 7 + k * (i % 5 + 1)) % len(WORDS)] for k in range(args.tokens))
        tokens = tokenize(url, text)[:args.tokens]
        first, _ = turn(url, tokens)
        second, cached = turn(url, tokens + tokenize(url, 'And what did the fish say then? Tell me more.')[:20])
        firsts.append(first)
        seconds.append(second)
        print(f'{len(tokens)} tokens: {1e3 * first:.0f} ms, then {1e3 * second:.0f} ms with {cached} of them cached', flush=True)
    a, b = statistics.median(firsts), statistics.median(seconds)
    print(f'medians {1e3 * a:.0f} ms and {1e3 * b:.0f} ms: {a / b:.1f} times sooner')


if __name__ == '__main__':
    main()
