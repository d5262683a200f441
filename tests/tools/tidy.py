#!/usr/bin/env python3
"""clang-tidy over the sources of the project, several at a time, remembering which files were clean.

Tests are left out: GoogleTest's macros take the analyzer longer than the rest together and hide what it finds.

A file is checked again only when it, a project header that it includes, .clang-tidy or clang-tidy itself changed:
~/.cache/shoal-tidy/ (of XDG_CACHE_HOME, where that is set) holds one empty file for each clean result, named by the hash
of all that, so another clone need not check it either. Marks that nothing asked for in a month are removed.
Run it after a build: the dependencies come from ninja's log.
"""
import argparse
import concurrent.futures
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TIDY = 'clang-tidy-14'
MONTH = 30 * 24 * 3600


def dependencies(build):
    """{object: [files of the project it was made from]} out of `ninja -t deps`."""
    deps, target = {}, None
    for line in subprocess.run(['ninja', '-C', build, '-t', 'deps'], capture_output=True, text=True,
                               check=True).stdout.splitlines():
        if line.startswith(' '):
            path = pathlib.Path(build, line.strip()).resolve()
            if ROOT in path.parents:
                deps[target].append(path)
        elif ':' in line:
            target = line.split(':', 1)[0]
            deps[target] = []
    return deps


def digest(paths, salt):
    h = hashlib.sha256(salt)
    for path in sorted(set(paths)):
        h.update(str(path.relative_to(ROOT)).encode() + b'\0' + path.read_bytes() + b'\0')
    return h.hexdigest()[:32]


def check(source, build):
    start = time.monotonic()
    # The build is GCC's and may use warnings that clang does not know.
    run = subprocess.run([TIDY, '--quiet', '-p', str(build), '--extra-arg=-Wno-unknown-warning-option', str(source)],
                         capture_output=True, text=True)
    # Warnings in system headers are counted on stderr even when nothing is wrong.
    return run.returncode, run.stdout.strip() or (run.stderr.strip() if run.returncode else ''), time.monotonic() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--build', required=True, type=pathlib.Path)
    parser.add_argument('--jobs', type=int, default=os.cpu_count())
    args = parser.parse_args()
    build = args.build.resolve()
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.environ.get('HOME', '/tmp'), '.cache')
    seen = pathlib.Path(cache) / 'shoal-tidy'
    seen.mkdir(parents=True, exist_ok=True)
    for mark in seen.iterdir():
        if time.time() - mark.stat().st_mtime > MONTH:
            mark.unlink()

    salt = (ROOT / '.clang-tidy').read_bytes()
    salt += subprocess.run([TIDY, '--version'], capture_output=True, check=True).stdout
    deps = dependencies(build)
    work = {}  # source -> the mark that says it was clean
    for entry in json.loads((build / 'compile_commands.json').read_text()):
        source = pathlib.Path(entry['file'])
        if ROOT / 'tests' in source.parents:
            continue
        if source.suffix != '.cc' or ROOT not in source.parents or build in source.parents:
            continue
        inputs = [p for p in deps.get(entry.get('output', ''), []) if build not in p.parents] + [source]
        mark = seen / digest(inputs, salt + entry['command'].replace(str(ROOT), '.').encode())
        if mark.exists():
            mark.touch()
        else:
            work[source] = mark
    print(f'{len(work)} files to check', flush=True)

    failed = 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = {pool.submit(check, source, build): source for source in sorted(work)}
        for done in concurrent.futures.as_completed(runs):
            code, text, seconds = done.result()
            source = runs[done]
            print(f'{source.relative_to(ROOT)} {seconds:.1f} s', flush=True)
            if code:
                failed += 1
                print(text, flush=True)
            else:
                work[source].touch()
    if failed:
        sys.exit(f'{failed} files with findings')


if __name__ == '__main__':
    main()
