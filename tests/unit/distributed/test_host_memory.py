"""Freed memory is kept for the next step."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.paths import ROOT

FAULTS = """
import ctypes, os, resource
from train.distributed.host_memory import keep_freed_memory
if {kept}:
    assert keep_freed_memory() and os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
libc, size = ctypes.CDLL(None), 64 * 2**20
libc.malloc.restype, libc.free.argtypes, libc.memset.argtypes = (
    ctypes.c_void_p, [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t])
for step in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(ctypes.c_size_t(size))
    libc.memset(block, 1, size)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_freed_block_is_taken_again_without_page_faults() -> None:
    faults = {
        kept: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS.format(kept=kept)],
                cwd=ROOT,
                check=True,
                capture_output=True,
                text=True,
                timeout=60,
            ).stdout
        )
        for kept in (False, True)
    }
    assert faults[True] < 20 < faults[False]
