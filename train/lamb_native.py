"""The two passes as C loops, built on first use by the machine's own compiler (a tenth of a second).

Nothing is compiled at install time, and where there is no compiler `build` returns None: the eager passes
then do the same in about twice the time. The library is built anew by each process, for its own processor,
in a temporary folder: nothing stale or foreign is ever loaded.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from train.lamb_geometry import Piece, TensorRule
from train.lamb_math import Part

SOURCE = Path(__file__).with_name("lamb_native.c")
# -ffp-contract=off keeps each element's rounding the same in vector bodies and scalar tails.
FLAGS = ("-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno")
TUNING = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ())
FP32_BYTES = 4
GRAIN = 16
"""Spans are cut among threads at multiples of so many elements."""


# Mirror of the C struct.
SPAN = np.dtype(
    [
        *((name, np.uintp) for name in ("p", "g", "m", "v")),
        ("numel", np.int64),
        *((name, np.float64) for name in ("sum_p", "sum_u")),
        *(
            (name, np.float32)
            for name in (
                "beta1_weight",
                "beta2",
                "beta2_weight",
                "grad_norm",
                "stretch",
                "shift",
                "decay",
                "factor",
            )
        ),
    ]
)


@dataclass(frozen=True)
class Cuts:
    """The pieces of a step, cut into one equal share of elements per thread; int64 arrays of one length."""

    part: np.ndarray
    """Which of the step's parts the span lies in."""
    tensor: np.ndarray
    start: np.ndarray
    """Its first element in the part."""
    numel: np.ndarray
    bounds: tuple[int, ...]
    """Thread k has the spans bounds[k] to bounds[k + 1]."""


@functools.lru_cache(maxsize=4)
def cut(pieces: tuple[tuple[Piece, ...], ...], threads: int) -> Cuts:
    """Cut the pieces of each part among `threads`; where no tensor moves, every step's cut is the same."""
    quota = -(-sum(piece.stop - piece.start for part in pieces for piece in part) // threads)
    rows: list[tuple[int, int, int, int]] = []
    bounds, room = [0], quota
    for part, its_pieces in enumerate(pieces):
        for piece in its_pieces:
            start = piece.start
            while start < piece.stop:
                if room <= 0:
                    bounds.append(len(rows))
                    room = quota
                stop = min(piece.stop, start + -(-room // GRAIN) * GRAIN)
                rows.append((part, piece.tensor, start, stop - start))
                room -= stop - start
                start = stop
    columns = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    return Cuts(columns[0], columns[1], columns[2], columns[3], (*bounds, len(rows)))


@functools.cache
def build() -> ctypes.CDLL | None:
    """The compiled passes, or None where no C compiler is found or it fails."""
    try:
        compiler = _compiler()
        return _compile(compiler) if compiler else None
    except (OSError, ValueError):  # no temporary folder; a CC with one quotation mark
        return None


def _compiler() -> list[str]:
    """The words of a command: CC as a shell would take it, or a path with blanks; [] where there is none."""
    given = os.environ.get("CC", "").strip()
    if given:
        return [given] if shutil.which(given) else shlex.split(given)
    found = (shutil.which(name) for name in ("cc", "gcc", "clang"))
    return next(([path] for path in found if path), [])


def _compile(compiler: list[str]) -> ctypes.CDLL | None:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "lamb_native.so")
        for tuning in TUNING:
            command = [*compiler, *FLAGS, *tuning, "-o", str(library), str(SOURCE), "-lm"]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                loaded = ctypes.CDLL(str(library))
                functions = loaded.lamb_first_pass, loaded.lamb_second_pass
            except (OSError, AttributeError, subprocess.SubprocessError):
                continue  # AttributeError: what was built is not ours
            for function in functions:
                function.argtypes = (ctypes.c_void_p, ctypes.c_int64)
                function.restype = None
            return loaded
    return None


class NativePasses:
    """Both passes over fp32 CPU tensors; the same contract as lamb_eager.EagerPasses."""

    name = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._pool: ThreadPoolExecutor | None = None
        self._of_step: tuple[np.ndarray, Cuts] | None = None  # from the first pass to the second
        self._threads = self._pid = 0

    def first(
        self,
        parts: Sequence[Part],
        rules: Sequence[TensorRule],
        sums: torch.Tensor,
        grad_norm: torch.Tensor | None,
    ) -> None:
        cuts = cut(tuple(part.pieces for part in parts), torch.get_num_threads())
        spans = spans_of(parts, rules, cuts)
        spans["grad_norm"] = 1.0 if grad_norm is None else float(grad_norm)
        self._run(self._library.lamb_first_pass, spans, cuts.bounds)
        adapt = np.array([rule.adapt for rule in rules])[cuts.tensor]
        for column, name in enumerate(("sum_p", "sum_u")):
            totals = np.bincount(cuts.tensor, weights=np.where(adapt, spans[name], 0.0), minlength=len(rules))
            sums[:, column] += torch.from_numpy(totals)
        self._of_step = spans, cuts

    def second(self, parts: Sequence[Part], rules: Sequence[TensorRule], ratios: torch.Tensor) -> None:
        assert self._of_step is not None, "the second pass follows the first one of the same step"
        (spans, cuts), self._of_step = self._of_step, None
        step_sizes = np.array([part.c.step_size for part in parts])
        spans["factor"] = ratios.numpy()[cuts.tensor].astype(np.float64) * step_sizes[cuts.part]
        self._run(self._library.lamb_second_pass, spans, cuts.bounds)

    def _run(self, function: ctypes._NamedFuncPointer, spans: np.ndarray, bounds: Sequence[int]) -> None:
        calls = [
            (spans.ctypes.data + SPAN.itemsize * start, stop - start) for start, stop in pairwise(bounds)
        ]
        if len(calls) == 1:
            function(*calls[0])
            return
        # Threads do not survive a fork: a child makes its own.
        if self._pool is None or self._threads < len(calls) or self._pid != os.getpid():
            self._threads, self._pid = len(calls), os.getpid()
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="lamb")
        # ctypes releases the interpreter's lock for the length of a call.
        list(self._pool.map(lambda call: function(*call), calls))


def spans_of(parts: Sequence[Part], rules: Sequence[TensorRule], cuts: Cuts) -> np.ndarray:
    """What the first pass is told of each span: addresses and scalars, (spans,) of SPAN."""
    spans = np.zeros(len(cuts.part), dtype=SPAN)
    for name in ("p", "g", "m", "v"):
        addresses = np.array([getattr(part, name).data_ptr() for part in parts], dtype=np.uintp)
        spans[name] = addresses[cuts.part] + (FP32_BYTES * cuts.start).astype(np.uintp)
    spans["numel"] = cuts.numel
    scalars = np.array(
        [(1 - c.beta1, c.beta2, 1 - c.beta2, c.stretch, c.shift) for c in (x.c for x in parts)]
    )
    for name, column in zip(
        ("beta1_weight", "beta2", "beta2_weight", "stretch", "shift"), scalars.T, strict=True
    ):
        spans[name] = column[cuts.part]
    decays = np.array([rule.decay for rule in rules])[cuts.tensor]
    spans["decay"] = np.where(decays, np.array([part.c.weight_decay for part in parts])[cuts.part], 0.0)
    return spans
