#!/usr/bin/env python3
"""Folders may include only what stands to their left: kernels <- {comm, offload} <- shard <- parallel <- launcher."""
import pathlib
import re
import sys

MAY_INCLUDE = {
    'kernels': set(),
    'comm': {'kernels'},
    'offload': {'kernels'},
    'shard': {'kernels', 'comm', 'offload'},
    'parallel': {'kernels', 'comm', 'offload', 'shard'},
    'launcher': {'kernels', 'comm', 'offload', 'shard', 'parallel'},
}
INCLUDE = re.compile(r'^\s*#\s*include\s*["<]([a-z_]+)/', re.MULTILINE)


def violations(root):
    """(file, folder it wrongly includes) for each wrong include, and how many files were read."""
    wrong, read = [], 0
    for folder, allowed in MAY_INCLUDE.items():
        for path in sorted((root / folder).rglob('*')):
            if path.suffix not in ('.h', '.cc', '.cu', '.cuh'):
                continue
            read += 1
            for target in INCLUDE.findall(path.read_text(encoding='utf-8')):
                if target == 'tests' or (target in MAY_INCLUDE and target != folder and target not in allowed):
                    wrong.append((path.relative_to(root), target))
    return wrong, read


def self_check():
    """The pattern must see the forms an include takes, or a clean result would mean nothing."""
    text = '#include "parallel/model.h"\n#  include <launcher/x.h>\n// #include "comm/y.h"\n#include <vector>\n'
    assert INCLUDE.findall(text) == ['parallel', 'launcher'], INCLUDE.findall(text)


if __name__ == '__main__':
    self_check()
    wrong, read = violations(pathlib.Path(__file__).resolve().parent.parent)
    for path, target in wrong:
        print(f'{path}: must not include from {target}/')
    if not read:
        sys.exit('no source files found: the test looked in the wrong place')
    print(f'{read} files, {len(wrong)} includes in the wrong direction')
    sys.exit(1 if wrong else 0)
