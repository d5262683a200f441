#!/usr/bin/env python3
"""Runs a command as one MPI rank and writes the peak resident memory that the kernel counted for it.

  mpirun -np 2 peak_memory.py FOLDER shoal run ...     writes FOLDER/rank-0.json and FOLDER/rank-1.json
"""
import json
import os
import pathlib
import resource
import subprocess
import sys

folder, command = sys.argv[1], sys.argv[2:]
code = subprocess.call(command)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
rank = os.environ.get('OMPI_COMM_WORLD_RANK', '0')
pathlib.Path(folder, f'rank-{rank}.json').write_text(json.dumps({'peak_bytes': peak, 'exit': code}))
sys.exit(code)
