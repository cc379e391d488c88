"""Both passes as C loops. Where there is no compiler `build` returns None: the eager kernel then does the same in three
times the time.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .compiler import compile_library, num_threads
from .parameters import TensorRule
from .update import Buffers, Kernel
from .zero_layout import Fragment

SOURCE = Path(__file__).with_name("native.c")
FUNCTIONS = ("lamb_first", "lamb_second", "lamb_both")
FP32_BYTES = 4
NO_LIMITS = (-math.inf, math.inf)
KEPT = 1 << 21
"""Updates that each thread keeps from the first pass to the second, where both run: 8 MiB. Of a larger share of a
tensor they are computed anew."""


# Mirrors of the C structs.
FLOATS = ("beta1_weight", "beta2", "beta2_weight", "grad_norm", "stretch", "shift", "decay")
SPAN = np.dtype(
    [
        *((name, np.uintp) for name in ("p", "g", "m", "v")),
        *((name, np.int64) for name in ("numel", "adapt")),
        *((name, np.float64) for name in ("sum_p", "sum_u", "step_size")),
        *((name, np.float32) for name in FLOATS),
    ],
    align=True,
)
STEP = np.dtype(
    [
        *((name, np.uintp) for name in ("ratios", "sums", "updates")),
        ("room", np.int64),
        *((name, np.float64) for name in ("low", "high")),
        ("threads", np.int64),
    ],
    align=True,
)


@functools.cache
def build() -> ctypes.CDLL | None:
    """The compiled loops, or None where no C compiler is found or it fails."""
    arguments = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    return compile_library(SOURCE, dict.fromkeys(FUNCTIONS, arguments))


class NativeKernel(Kernel):
    """Both passes over fp32 CPU tensors. Every element's result is the same on every processor, on any threads."""

    name = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._spans: np.ndarray | None = None  # from the first pass to the second
        self._updates = np.empty((0, 0), dtype=np.float32)

    def first_pass(
        self,
        buffers: Sequence[Buffers],
        rules: Sequence[TensorRule],
        sums: torch.Tensor,
        grad_norm: torch.Tensor | None,
    ) -> None:
        table = tabulate(tuple(one.fragments for one in buffers), tuple(rules))
        spans = spans_of(buffers, table, grad_norm)
        self._run(self._library.lamb_first, spans)
        for column, name in enumerate(("sum_p", "sum_u")):
            of_adapted = np.where(table.adapt, spans[name], 0.0)
            totals = np.bincount(table.tensor, weights=of_adapted, minlength=len(rules))
            sums[:, column] += torch.from_numpy(totals)
        self._spans = spans

    def second_pass(
        self, buffers: Sequence[Buffers], rules: Sequence[TensorRule], ratios: torch.Tensor
    ) -> None:
        assert self._spans is not None, "the second pass follows the first one of the same step"
        spans, self._spans = self._spans, None
        table = tabulate(tuple(one.fragments for one in buffers), tuple(rules))
        self._run(self._library.lamb_second, spans, ratios.numpy()[table.tensor])

    def both_passes(
        self,
        buffers: Sequence[Buffers],
        rules: Sequence[TensorRule],
        adapted: torch.Tensor,
        clamp: tuple[float, float] | None,
        grad_norm: torch.Tensor | None,
    ) -> torch.Tensor:
        """Tensor by tensor in one call, so that the second pass finds in the caches what the first one left there."""
        table = tabulate(tuple(one.fragments for one in buffers), tuple(rules))
        spans = spans_of(buffers, table, grad_norm)
        ratios = self._run(self._library.lamb_both, spans, room=KEPT, limits=clamp or NO_LIMITS)
        of_all = torch.ones(len(rules))
        of_all.numpy()[table.tensor] = ratios
        return of_all

    def _run(
        self,
        function: ctypes._NamedFuncPointer,
        spans: np.ndarray,
        ratios: np.ndarray | None = None,
        room: int = 0,
        limits: tuple[float, float] = NO_LIMITS,
    ) -> np.ndarray:
        """Call one of the C functions; (spans,) fp32 trust ratios, in to lamb_second and out of lamb_both."""
        threads = num_threads()
        if self._updates.shape != (threads, room):
            self._updates = np.empty((threads, room), dtype=np.float32)
        ratios = np.empty(len(spans), dtype=np.float32) if ratios is None else ratios
        sums = np.empty((len(spans), threads, 2))
        addresses = (array.ctypes.data for array in (ratios, sums, self._updates))
        step = np.array((*addresses, room, *limits, threads), dtype=STEP)
        # ctypes releases the interpreter's lock for the length of the call.
        function(spans.ctypes.data, len(spans), step.ctypes.data)
        return ratios


@dataclass(frozen=True)
class FragmentTable:
    """The fragments of a step; arrays with one element per fragment."""

    buffers: np.ndarray
    """Which of the step's buffers it lies in, int64."""
    tensor: np.ndarray
    start: np.ndarray
    """Its first element there."""
    numel: np.ndarray
    decay: np.ndarray
    """bool, as adapt."""
    adapt: np.ndarray


@functools.lru_cache(maxsize=4)
def tabulate(fragments: tuple[tuple[Fragment, ...], ...], rules: tuple[TensorRule, ...]) -> FragmentTable:
    """The fragments of each of the buffers; where no tensor moves, every step's table is the same."""
    rows = [
        (index, fragment.tensor, fragment.start, fragment.stop - fragment.start)
        for index, of_one in enumerate(fragments)
        for fragment in of_one
    ]
    index, tensor, start, numel = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    decay, adapt = (np.array([getattr(rule, name) for rule in rules])[tensor] for name in ("decay", "adapt"))
    return FragmentTable(index, tensor, start, numel, decay, adapt)


def spans_of(buffers: Sequence[Buffers], table: FragmentTable, grad_norm: torch.Tensor | None) -> np.ndarray:
    """Addresses and scalars of each fragment for the C functions, (fragments,) of SPAN."""
    spans = np.zeros(len(table.buffers), dtype=SPAN)
    for name in ("p", "g", "m", "v"):
        addresses = np.array([getattr(one, name).data_ptr() for one in buffers], dtype=np.uintp)
        spans[name] = addresses[table.buffers] + (FP32_BYTES * table.start).astype(np.uintp)
    spans["numel"] = table.numel
    spans["adapt"] = table.adapt
    spans["grad_norm"] = 1.0 if grad_norm is None else float(grad_norm)
    scalars = {
        "beta1_weight": [1 - one.c.beta1 for one in buffers],
        "beta2": [one.c.beta2 for one in buffers],
        "beta2_weight": [1 - one.c.beta2 for one in buffers],
        "stretch": [one.c.stretch for one in buffers],
        "shift": [one.c.shift for one in buffers],
        "step_size": [one.c.step_size for one in buffers],
        "decay": [one.c.weight_decay for one in buffers],
    }
    for name, values in scalars.items():
        spans[name] = np.array(values)[table.buffers]
    spans["decay"][~table.decay] = 0.0
    return spans
