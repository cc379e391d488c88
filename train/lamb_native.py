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
from pathlib import Path

import torch

from train.lamb_geometry import TensorRule
from train.lamb_math import Part, pieces_of

SOURCE = Path(__file__).with_name("lamb_native.c")
# -ffp-contract=off keeps each element's rounding the same in vector bodies and scalar tails.
FLAGS = ("-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno")
TUNING = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ())
GRAIN = 16
"""Spans are cut among threads at multiples of so many elements."""


class Span(ctypes.Structure):
    """Mirror of the C struct."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("p", "g", "m", "v")),
        ("numel", ctypes.c_int64),
        ("sum_p", ctypes.c_double),
        ("sum_u", ctypes.c_double),
        *(
            (name, ctypes.c_float)
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
    )


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
        self._threads = self._pid = 0

    def first(
        self,
        parts: Sequence[Part],
        rules: Sequence[TensorRule],
        sums: torch.Tensor,
        grad_norm: torch.Tensor | None,
    ) -> None:
        norm = 1.0 if grad_norm is None else float(grad_norm)
        shares = self._shares(parts, rules, norm, None)
        self._run(self._library.lamb_first_pass, shares)
        totals = [[0.0, 0.0] for _ in rules]
        for spans, tensors in shares:
            for span, tensor in zip(spans, tensors, strict=True):
                if rules[tensor].adapt:
                    totals[tensor][0] += span.sum_p
                    totals[tensor][1] += span.sum_u
        sums += torch.tensor(totals, dtype=torch.float64)

    def second(self, parts: Sequence[Part], rules: Sequence[TensorRule], ratios: torch.Tensor) -> None:
        self._run(self._library.lamb_second_pass, self._shares(parts, rules, 1.0, ratios.tolist()))

    def _shares(
        self, parts: Sequence[Part], rules: Sequence[TensorRule], norm: float, ratios: list[float] | None
    ) -> list[tuple[ctypes.Array[Span], list[int]]]:
        """The pieces cut into one equal share of elements per thread, with their tensors' numbers."""
        threads = torch.get_num_threads()
        total = sum(piece.stop - piece.start for part in parts for piece in part.pieces)
        quota = -(-total // threads)
        shares: list[list[Span]] = [[]]
        tensors: list[list[int]] = [[]]
        room = quota
        for part, piece, _, decay in pieces_of(parts, rules):
            c = part.c
            factor = 0.0 if ratios is None else ratios[piece.tensor] * c.step_size
            addresses = [x.data_ptr() for x in (part.p, part.g, part.m, part.v)]
            scalars = (1 - c.beta1, c.beta2, 1 - c.beta2, norm, c.stretch, c.shift, decay, factor)
            start = piece.start
            while start < piece.stop:
                if room <= 0:
                    shares.append([])
                    tensors.append([])
                    room = quota
                stop = min(piece.stop, start + -(-room // GRAIN) * GRAIN)
                shares[-1].append(Span(*(a + 4 * start for a in addresses), stop - start, 0, 0, *scalars))
                tensors[-1].append(piece.tensor)
                room -= stop - start
                start = stop
        return [((Span * len(s))(*s), t) for s, t in zip(shares, tensors, strict=True)]

    def _run(
        self, function: ctypes._NamedFuncPointer, shares: list[tuple[ctypes.Array[Span], list[int]]]
    ) -> None:
        calls = [(ctypes.addressof(spans), len(spans)) for spans, _ in shares]
        if len(calls) == 1:
            function(*calls[0])
            return
        # Threads do not survive a fork: a child makes its own.
        if self._pool is None or self._threads < len(calls) or self._pid != os.getpid():
            self._threads, self._pid = len(calls), os.getpid()
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="lamb")
        # ctypes releases the interpreter's lock for the length of a call.
        list(self._pool.map(lambda call: function(*call), calls))
