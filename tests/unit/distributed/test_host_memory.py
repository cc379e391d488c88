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
    assert keep_freed_memory()
libc, size = ctypes.CDLL(None), 64 * 2**20
libc.malloc.restype, libc.free.argtypes, libc.memset.argtypes = (
    ctypes.c_void_p, [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t])
for step in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(ctypes.c_size_t(size))
    libc.memset(block, 1, size)
    libc.free(block)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
libc.free(libc.malloc(ctypes.c_size_t(2**31 + size)))  # never touched
print(faults, int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE") > 2**31)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_blocks_are_taken_again_without_page_faults_and_more_than_2_gib_of_them_stay() -> None:
    faults, stayed = {}, {}
    for kept in (False, True):
        command = [sys.executable, "-c", FAULTS.format(kept=kept)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
        number, stayed[kept] = done.stdout.split()
        faults[kept] = int(number)
    assert faults[True] < 20 < faults[False]
    assert stayed == {False: "False", True: "True"}
