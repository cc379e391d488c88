"""The C loops: built by what compiler there is, on torch's own threads, equal to the two passes one by one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.lamb_checks import THIRD_STEP
from tests.paths import ROOT
from train.lamb import Lamb
from train.lamb import native as lamb_native
from train.lamb.parameters import TensorRule, tensor_rules
from train.lamb.update import Buffers, Kernel
from train.lamb.zero_layout import Fragment

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lamb_native, "build", lamb_native.build.__wrapped__)


def native() -> lamb_native.NativeKernel:
    library = lamb_native.build()
    assert library is not None
    return lamb_native.NativeKernel(library)


def example() -> tuple[list[Buffers], tuple[TensorRule, ...], torch.Tensor]:
    """Sizes around a vector's and a thread's share; zeros, zero gradients, a NaN, infinity; not all adapted."""
    random = torch.Generator().manual_seed(0)
    shapes = {
        "one.weight": (1, 1),
        "vector.weight": (1, 16),
        "tail.weight": (1, 17),
        "bias": (768,),
        "small.weight": (97, 103),
        "zero.weight": (40, 50),
        "still.weight": (40, 50),
        "nan.weight": (3, 7),
        "inf.weight": (5, 9),
        "large.weight": (513, 1_201),
    }
    parts = []
    for tensor, (name, shape) in enumerate(shapes.items()):
        p, g, m = (torch.randn(shape, generator=random).view(-1) * scale for scale in (0.02, 1.0, 1.0))
        v = torch.rand(p.shape, generator=random)
        if name == "zero.weight":
            p.zero_()
        if name == "still.weight":
            g.zero_(), m.zero_(), p.zero_()
        if name == "nan.weight":
            g[3] = torch.nan
        if name == "inf.weight":
            p[3] = torch.inf  # a ratio of inf / inf
        parts.append(Buffers(p, g, m, v, (Fragment(tensor, 0, p.numel()),), THIRD_STEP))
    named = [(name, torch.empty(shape)) for name, shape in shapes.items()]
    rules = tensor_rules(named, adapt_all=False, decay_all=False)
    return parts, rules, torch.tensor([rule.adapt for rule in rules])


@needs_compiler
@pytest.mark.parametrize(("clamp", "norm"), [(None, None), ((0.04, 0.05), None), (None, 3.7)])
@pytest.mark.parametrize("kept", [0, 5_000, lamb_native.KEPT])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_both_passes_in_one_call_are_the_two_passes(
    threads: int,
    kept: int,
    clamp: tuple[float, float] | None,
    norm: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, ratios and their special cases too, with updates kept or computed anew, on any threads."""
    monkeypatch.setattr(lamb_native, "KEPT", kept)
    # Sums that are read before they are written must not be right by luck.
    monkeypatch.setattr(lamb_native.np, "empty", lambda shape, dtype=float: np.full(shape, np.nan, dtype))
    kernel = native()
    torch.set_num_threads(1)
    kernel.both_passes(*example(), None, None)  # the room it makes is for one thread
    torch.set_num_threads(threads)
    outcomes = []
    for both in (lamb_native.NativeKernel.both_passes, Kernel.both_passes):
        parts, rules, adapted = example()
        ratios = both(kernel, parts, rules, adapted, clamp, None if norm is None else torch.tensor(norm))
        outcomes.append((ratios, *(x for part in parts for x in (part.p, part.m, part.v))))
    for at_once, one_by_one in zip(*outcomes, strict=True):
        torch.testing.assert_close(at_once, one_by_one, rtol=0, atol=0, equal_nan=True)
    assert len(set(outcomes[0][0].tolist())) >= 4


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
def test_sums_of_squares_are_taken_in_fp64(threads: int) -> None:
    """Without gradient, second moment and decay an update is the first moment divided by `shift`."""
    torch.set_num_threads(threads)
    p, g, m, v = torch.randn(10_007), torch.zeros(10_007), torch.randn(10_007), torch.zeros(10_007)
    sums = torch.zeros(1, 2, dtype=torch.float64)
    part = Buffers(p, g, m, v, (Fragment(0, 0, p.numel()),), THIRD_STEP)
    native().first_pass([part], [TensorRule("weight", decay=False, adapt=True)], sums, None)
    u = part.m / torch.tensor(THIRD_STEP.shift)
    expected = [float(x.double().square().sum()) for x in (p, u)]
    # Squares are exact; adding n positive numbers in any order rounds by at most n 2^-53 of their sum.
    assert sums[0].tolist() == pytest.approx(expected, rel=p.numel() * 2.0**-53)


TIMES_OF_THREADS = """
import time
from pathlib import Path
import torch
from tests.unit.lamb.test_native import example, native

def times():
    tasks = Path("/proc/self/task").iterdir()
    return {task.name: int((task / "schedstat").read_text().split()[0]) for task in tasks}

torch.set_num_threads(3)
torch.randn(1 << 20).square()
kernel, tensors = native(), example()
time.sleep(0.3)  # torch's threads are asleep by now
before = times()
kernel.both_passes(*tensors, None, None)
after = times()
print(len(after) - len(before), sum(after[thread] > before.get(thread, 0) for thread in after))
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's schedstat")
def test_runs_on_the_threads_of_torch() -> None:
    """Threads of its own would compete with torch's, which look for work in a loop for a while."""
    environment = {**os.environ, "CC": "gcc", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", TIMES_OF_THREADS], env=environment, capture_output=True, text=True, check=True
    )
    new, busy = map(int, done.stdout.split())
    assert new == 0, "no thread of its own"
    assert busy >= 3


@needs_compiler
def test_a_compiler_without_openmp_gives_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All forms of the passes then take the shares of one thread, although torch has three."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    torch.set_num_threads(3)
    kernels = [native()]
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(lamb_native, "build", lamb_native.build.__wrapped__)
    kernels.append(native())
    for both in (lamb_native.NativeKernel.both_passes, Kernel.both_passes):
        outcomes = []
        for kernel in kernels:
            parts, rules, adapted = example()
            ratios = both(kernel, parts, rules, adapted, None, None)
            outcomes.append([ratios, *(part.p for part in parts)])
        for with_threads, alone in zip(*outcomes, strict=True):
            torch.testing.assert_close(alone, with_threads, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("made", ["new", "made", "stepped"])
def test_a_forked_child_can_step(made: str) -> None:
    """Threads do not survive a fork; a child that counted on its parent's would wait for ever."""
    torch.set_num_threads(2)
    torch.randn(1 << 20).square()
    weight = torch.nn.Parameter(torch.ones(100, 100))
    weight.grad = torch.ones_like(weight)
    optimizer = Lamb([("weight", weight)], lr=0.01)
    if made == "stepped":
        optimizer.step()
    child = os.fork()
    if child == 0:
        try:
            if made == "new":
                optimizer = Lamb([("weight", weight)], lr=0.01)
            optimizer.step()
            os._exit(0 if optimizer.kernel == "native" or lamb_native.build() is None else 2)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 10
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    if done[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done[0] == child, "the child hangs"
    assert os.waitstatus_to_exitcode(done[1]) == 0


@pytest.mark.usefixtures("built_anew")
def test_without_a_compiler_the_eager_passes_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nonexistent/cc")
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    Lamb([("weight", weight)], lr=0.1).step()
    assert weight[0, 0] < 1
    with pytest.raises(ValueError, match=r"fused=True, but there is no fused LAMB for torch.float32 on cpu"):
        Lamb([("weight", weight)], lr=0.1, fused=True).step()


@needs_compiler
@pytest.mark.parametrize(
    ("command", "works"),
    [
        ("{folder}/two words/cc", True),
        ("'{folder}/two words/cc' -O1", True),
        ("cc -O1", True),
        ("  ", True),
        ("'{folder}/two words/cc", False),
        ("false", False),
        ("{folder}/stranger", False),
        ("{folder}", False),
    ],
)
def test_what_cc_may_be(
    built_anew: None, command: str, works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path with blanks, a command with options; what fails or builds something else leaves no kernel."""
    short = tmp_path / "short.c"
    short.write_text("void lamb_first(void) {} void lamb_second(void) {} void lamb_both(void) {}")
    monkeypatch.setattr(lamb_native, "SOURCE", short)
    (tmp_path / "two words").mkdir()
    (tmp_path / "two words" / "cc").symlink_to(str(shutil.which("cc")))
    stranger = tmp_path / "stranger"  # builds a library without our functions
    stranger.write_text(
        '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho "int x;" | cc -shared -fPIC -o "$2" -xc -\n'
    )
    stranger.chmod(0o755)
    monkeypatch.setenv("CC", command.format(folder=tmp_path))
    assert (lamb_native.build() is not None) == works
