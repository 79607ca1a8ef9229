"""Freed memory goes back to the system."""

import subprocess
import sys

CODE = """
import os
import torch
from pretrain.engine.zero.host_memory import return_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

blocks = [torch.ones(16_000) for _ in range(2000)]  # 122 MiB, in the heap
pin = torch.ones(16_000)  # keeps the top of the heap in use, as what is built last does
del blocks
before = resident()
return_freed_memory()
print(before - resident())
"""


def test_small_blocks_are_returned_from_the_middle_of_the_heap():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100 * 2**20
