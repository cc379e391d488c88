"""The library that gives torch's CPU build a kind of device named "cuda", compiled here (a few seconds)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).with_name("device.cpp")
REQUIRED = "HALFLING_REQUIRE_CLUSTER_TESTS"
"""Set by .ci/run: there a missing compiler is a fault, not a reason to skip."""


def build(folder: Path) -> Path:
    """The library, in `folder`; skips where there is no C++ compiler."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has a CUDA of its own: see tests/gpu")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        reason = "no C++ compiler: apt-get install g++"
        if os.environ.get(REQUIRED):
            pytest.fail(f"{REQUIRED} is set, but: {reason}")
        pytest.skip(reason)
    root = Path(torch.__file__).parent
    library, libraries = folder / "libfake_cuda.so", root / "lib"
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    links = [f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
    command = [compiler, "-std=c++20", "-shared", "-fPIC", *includes, str(SOURCE), "-o", str(library), *links]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return library
