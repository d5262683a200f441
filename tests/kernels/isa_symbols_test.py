#!/usr/bin/env python3
"""Files compiled for one instruction set must not offer inline library code to the linker.

The linker keeps one copy of each weak symbol. Were that copy compiled for AVX-512, machines without it would crash in
places that never asked for it. Static initializers would even run at start.

  isa_symbols_test.py NM LIBRARY
"""
import re
import subprocess
import sys

ISA_OBJECT = re.compile(r'_(avx2|avxvnni|avx512|amx|neon|i8mm)\.cc\.o:$')


def offences(listing):
    """Weak functions and static initializers of objects for one instruction set, and how many objects there are.

    Weak data, such as the type names that sanitizers want, does no harm.
    """
    found, objects, current = [], 0, None
    for line in listing.splitlines():
        if line.endswith(':'):
            current = line[:-1] if ISA_OBJECT.search(line) else None
            objects += current is not None
            continue
        fields = line.split()
        if current is None or len(fields) != 3:  # "address kind name"; undefined symbols have no address
            continue
        _, kind, name = fields
        sanitizer = 'asan' in name or 'tsan' in name or 'sancov' in name
        if (kind == 'W' or '_GLOBAL__sub_I' in name) and not sanitizer:
            found.append(f'{current}: {kind} {name}')
    return found, objects


def main():
    nm, library = sys.argv[1:]
    listing = subprocess.run([nm, library], check=True, capture_output=True, text=True).stdout
    found, objects = offences(listing)
    if objects == 0:
        sys.exit(f'{library} holds no object of one instruction set: did the files change their names?')
    if found:
        sys.exit('inline code compiled for one instruction set:\n' + '\n'.join(found))
    print(f'{objects} objects keep their code to themselves')


if __name__ == '__main__':
    main()
