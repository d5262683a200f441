#!/usr/bin/env python3
"""Speed over a LAN: hosts of one core each (network namespaces of this machine) with links of a given rate between them.

lan_speed.py -m FILE [--shoal build/shoal] [--hosts 2] [--rates 100mbit,1gbit,2.5gbit,10gbit] [-p 512] [-n 32] [-r 5] [FLAGS...]

FLAGS are groups for shoal bench, one line each: "--tp 2" "--tp 2 --wire f32" "--pp 2"; default: the first and the last. Needs root.
"""
import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / 'tools'))
from lan import Lan  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-m', '--model', required=True)
    parser.add_argument('--shoal', default='build/shoal', type=pathlib.Path)
    parser.add_argument('--hosts', type=int, default=2)
    parser.add_argument('--rates', default='100mbit,1gbit,2.5gbit,10gbit')
    parser.add_argument('-p', '--prompt', type=int, default=512)
    parser.add_argument('-n', '--generate', type=int, default=32)
    parser.add_argument('-r', '--repetitions', type=int, default=5)
    parser.add_argument('flags', nargs='*')
    a = parser.parse_args()
    groups = a.flags or [f'--tp {a.hosts}', f'--pp {a.hosts}']
    print('| link | flags | prompt, tokens/s | decode, tokens/s |\n| --- | --- | ---: | ---: |', flush=True)
    for rate in a.rates.split(','):
        with Lan(a.hosts, rate) as lan:
            for flags in groups:
                out = lan.run(1, [a.shoal.resolve(), 'bench', '-m', a.model, '-t', 1, '-p', a.prompt, '-n', a.generate, '-r', a.repetitions,
                                  '-o', 'json', '--hostfile', lan.hostfile(), *flags.split()])
                speeds = [f"{test['avg_ts']:.1f} ± {test['stddev_ts']:.1f}" for test in json.loads(out)]
                print(f'| {rate} | `{flags}` | {" | ".join(speeds)} |', flush=True)


if __name__ == '__main__':
    main()
