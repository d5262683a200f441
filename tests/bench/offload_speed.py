#!/usr/bin/env python3
"""Weights streamed from disk: speed beside what fio reads from the same file, and beside what `shoal plan` says.

offload_speed.py -m SHARDS [--shoal build/shoal] [--caps 75,50,25] [-n 8] [-p 0] [--parallel 1] [--step-seconds C] [--disk-rate 1.0G]
    [--json FILE]

--disk-rate emulates a disk of that many bytes per second (10^9 for G): fio, the plan and the runs share one blkio cgroup (v1) that
throttles reads of the disk under the model. A rate that the disk itself keeps up makes figures repeatable where the disk, as that of a
virtual machine, is not steady.

Each cap (percent of the weights, or bytes such as 2G) is a memory cgroup of its own (v1, needs root) with no other limit given. fio
(io_uring, direct, 1 MiB, depth 8) reads the file of rank 0 right before and right after each run. C is the time of a step with all
weights in memory, measured first unless given. Printed for each run:

  efficiency  bytes read per second of wall time, of fio's
  of 1/T      tokens per second, of 1/T with T = max(C, bytes read per token / fio)
  read/(W-R)  bytes read per token, of the weights that are not in memory
  I/O cpu     CPU time of the threads that read, per second
  peak        the cgroup's, of its limit
  plan        what shoal plan said before the runs of a cap, of what was measured
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

CGROUPS = pathlib.Path('/sys/fs/cgroup')
UNITS = {'K': 1 << 10, 'M': 1 << 20, 'G': 1 << 30}


def fio(path, seconds=3, group=None):
    """Bytes per second, throttled as what runs in `group`."""
    out = subprocess.run(['fio', '--name=read', f'--filename={path}', '--readonly', '--rw=read', '--bs=1M', '--direct=1',
                          '--ioengine=io_uring', '--iodepth=8', f'--runtime={seconds}', '--time_based', '--output-format=json'],
                         check=True, preexec_fn=group.enter_disk if group else None, stdout=subprocess.PIPE).stdout
    return json.loads(out)['jobs'][0]['read']['bw_bytes']


def disk_of(path):
    """The number, as 254:0, of the whole disk that holds `path`: throttles know no partitions."""
    device = os.stat(path).st_dev
    node = pathlib.Path(f'/sys/dev/block/{os.major(device)}:{os.minor(device)}').resolve()
    return ((node.parent if (node / 'partition').exists() else node) / 'dev').read_text().strip()


class Cgroup:
    """A memory cgroup of `limit` bytes, and one whose reads of `disk` are throttled to `rate` bytes per second; None: none."""

    def __init__(self, limit, rate=None, disk=None):
        self.limit, self.rate, self.disk = limit, rate, disk
        name = f'shoal-offload-speed-{os.getpid()}'
        self.memory = CGROUPS / 'memory' / name
        self.blkio = CGROUPS / 'blkio' / name

    def __enter__(self):
        if self.limit:
            self.memory.mkdir()
            (self.memory / 'memory.limit_in_bytes').write_text(str(self.limit))
        if self.rate:
            self.blkio.mkdir()
            (self.blkio / 'blkio.throttle.read_bps_device').write_text(f'{self.disk} {int(self.rate)}')
        return self

    def __exit__(self, *_):
        if self.limit:
            self.memory.rmdir()
        if self.rate:
            self.blkio.rmdir()

    def enter_disk(self):
        if self.rate:
            (self.blkio / 'cgroup.procs').write_text(str(os.getpid()))

    def enter(self):
        if self.limit:
            (self.memory / 'cgroup.procs').write_text(str(os.getpid()))
        self.enter_disk()

    def run(self, *command):
        result = subprocess.run([str(c) for c in command], preexec_fn=self.enter, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if result.returncode != 0:
            sys.exit(f'{" ".join(map(str, command))}: exit {result.returncode}\n{result.stderr}')
        return result.stdout

    def peak(self):
        return int((self.memory / 'memory.max_usage_in_bytes').read_text()) if self.limit else 0

    def failures(self):
        return int((self.memory / 'memory.failcnt').read_text()) if self.limit else 0


def drop_cache(path):
    with open(path, 'rb') as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench(group, a, prompt, generate):
    out = group.run(a.shoal, 'bench', '-m', a.model, '-p', prompt, '-n', generate, '-r', a.repetitions, '-c', a.context, '-b', a.batch,
                    '-t', a.threads, '--parallel', a.parallel, '-o', 'json', '-q', *a.flag)
    return json.loads(out)


def plan(group, a):
    # -b as the run rounds it: the plan is of one sequence with a KV cache for all of them.
    return json.loads(group.run(a.shoal, 'plan', '-m', a.model, '-c', a.context, '-b', a.batch, '-t', a.threads, '-o', 'json',
                                *(['--measure'] if a.measure else []), *a.flag))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-m', '--model', required=True, type=pathlib.Path)
    parser.add_argument('--shoal', default='build/shoal')
    parser.add_argument('--caps', default='75,50,25')
    parser.add_argument('-n', '--generate', type=int, default=8)
    parser.add_argument('-p', '--prompt', type=int, default=0)
    parser.add_argument('--parallel', type=int, default=1)
    parser.add_argument('-c', '--context', type=int, default=256)
    parser.add_argument('-b', '--batch', type=int, default=128)
    parser.add_argument('-t', '--threads', type=int, default=2)
    parser.add_argument('-r', '--repetitions', type=int, default=1)
    parser.add_argument('--step-seconds', type=float)
    parser.add_argument('--disk-rate', help='bytes per second that reads are throttled to, as 1.5G; default: not')
    parser.add_argument('--no-measure', dest='measure', action='store_false', help='plan with what it measured earlier')
    parser.add_argument('--flag', action='append', default=[], help='passed on to shoal, as --flag=--kv-type=f32')
    parser.add_argument('--json', type=pathlib.Path, help='appends one line for each run')
    a = parser.parse_args()
    file = a.model / 'rank-000.shard'
    weights = file.stat().st_size
    rate = a.disk_rate and float(a.disk_rate.rstrip('G')) * (1e9 if a.disk_rate.endswith('G') else 1)
    disk = disk_of(file) if rate else None
    drop_cache(file)
    step = a.step_seconds
    if step is None:
        with Cgroup(None) as free:
            step = 1 / bench(free, a, 0, max(a.generate, 16))[0]['avg_ts'] * a.parallel
        print(f'C = {step:.3f} s with {weights / 1e9:.2f} GB of weights in memory')
    print('| cap | test | tokens/s | fio GB/s | read GB/s | efficiency | of 1/T | read/(W-R) | I/O cpu | peak | plan |\n' +
          '| ---: ' * 11 + '|', flush=True)
    for cap in a.caps.split(','):
        limit = int(float(cap[:-1]) * UNITS[cap[-1]]) if cap[-1] in UNITS else int(weights * float(cap) / 100)
        with Cgroup(limit, rate, disk) as group:
            said = plan(group, a)
        for prompt, generate in ((a.prompt, 0), (0, a.generate)):
            if prompt + generate == 0:
                continue
            with Cgroup(limit, rate, disk) as group:
                before = fio(file, group=group)
                got = bench(group, a, prompt, generate)[0]
                after = fio(file, group=group)
                raw = statistics.mean((before, after))
                read = got.get('streamed', {'bytes': 0, 'seconds': 1, 'cpu_s': 0})
                missing = said['ranks'][0]['disk_bytes_per_token']
                tokens_per_s = got['avg_ts']
                speed = read['bytes'] / read['seconds']
                # A prompt is one or more passes of `batch` rows.
                passes = a.repetitions * (generate if generate else -(-prompt // a.batch) * a.parallel)
                per_pass = read['bytes'] / passes
                ideal = max(step, per_pass / raw)
                of_ideal = f'{tokens_per_s / a.parallel * ideal:.1%}' if generate else ''
                predicted = said['decode_tokens_per_s'] * a.parallel if generate else said['prefill_tokens_per_s']
                row = {'cap': limit, 'test': f'tg{generate}' if generate else f'pp{prompt}', 'parallel': a.parallel, 'rate': tokens_per_s,
                       'fio_before': before, 'fio_after': after, 'read_bytes_per_s': speed, 'per_pass': per_pass, 'missing': missing,
                       'streamed': read, 'peak': group.peak(), 'failures': group.failures(), 'predicted': predicted,
                       'plan_disk': said['disk_bytes_per_s'], 'step': step}
                print(f'| {limit / 1e9:.2f} GB | {row["test"]} x{a.parallel} | {tokens_per_s:.3f} | {before / 1e9:.2f}, {after / 1e9:.2f} | '
                      f'{speed / 1e9:.2f} | {speed / raw:.1%} | {of_ideal} | {per_pass / max(1, missing):.3f} | '
                      f'{read["cpu_s"] / read["seconds"]:.1%} | {group.peak() / limit:.1%} | {predicted / tokens_per_s:.1%} |', flush=True)
                if a.json:
                    with a.json.open('a') as f:
                        f.write(json.dumps(row) + '\n')


if __name__ == '__main__':
    main()
