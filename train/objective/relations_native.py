"""The pass of relations.py over vectors on a CPU as C loops (relations.c), built on first use.

Nothing of a map leaves the processor's caches, and padding is left out. Without a C compiler torch operations do it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from train.lamb import compile_library, num_threads

SOURCE = Path(__file__).with_name("relations.c")
OPTIONS = {
    torch.float32: ("-ffp-contract=fast",),
    torch.float64: ("-ffp-contract=fast", "-DIN_DOUBLE"),
}
"""Of vectors.h."""
ROWS, WIDE_BYTES = 8, 128
"""Of the C file: rows that exist at once, and what the columns' bytes are rounded up to."""

# Mirrors of the C structs.
RELATION = np.dtype(
    [
        *((name, np.uintp) for name in ("student", "teacher", "gradient")),
        *((name, np.int64) for name in ("student_stride", "teacher_stride", "gradient_stride")),
    ],
    align=True,
)
SIZES = ("room", "num_relations", "batch", "heads", "student_size", "teacher_size", "threads")
PROBLEM = np.dtype(
    [
        *((name, np.uintp) for name in ("relations", "starts", "kept", "weights", "values", "rooms")),
        *((name, np.int64) for name in SIZES),
    ],
    align=True,
)


@functools.cache
def build(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled loops for vectors of this dtype, fp32 or fp64; None where no C compiler is found or it fails."""
    return compile_library(SOURCE, {"relations": (ctypes.c_void_p,)}, OPTIONS[dtype])


def native_pass(
    library: ctypes.CDLL,
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    weights: torch.Tensor,
    padding: torch.Tensor | None,
    heads: int,
    needs_gradient: bool,
) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """The value, and the gradients (B, L, width) of the student's vectors.

    Args:
        library: of the weights' dtype.
        student, teacher: (B, L, width) each, on the CPU.
        weights: (B, L), fp32 or fp64: of each position, by heads.
        padding: (B, L) bool; None where nothing is padded.
    """
    dtype, (batch, length) = weights.dtype, weights.shape
    own, theirs = ([_by_position(each, dtype) for each in vectors] for vectors in (student, teacher))
    gradients = [torch.zeros(each.shape, dtype=dtype) for each in own] if needs_gradient else None
    counted = torch.ones(batch, length, dtype=torch.bool) if padding is None else ~padding
    kept = counted.flatten().nonzero().flatten().numpy()
    starts = np.concatenate([[0], counted.sum(1).numpy()]).cumsum()
    relations = np.zeros(len(own), dtype=RELATION)
    for name, tensors in (("student", own), ("teacher", theirs), ("gradient", gradients)):
        if tensors is not None:
            relations[name] = [tensor.data_ptr() for tensor in tensors]
            relations[f"{name}_stride"] = [tensor.stride(1) for tensor in tensors]
    sizes = own[0].shape[-1] // heads, theirs[0].shape[-1] // heads
    columns = WIDE_BYTES // dtype.itemsize
    padded = -(-length // columns) * columns
    room = padded * (2 * sizes[0] + sizes[1] + 2 * ROWS)
    threads = num_threads()
    values, rooms = np.zeros(len(own) * batch * heads), torch.empty(threads * room, dtype=dtype)
    weights = weights.contiguous()
    addresses = (relations.ctypes.data, starts.ctypes.data, kept.ctypes.data, weights.data_ptr())
    problem = np.array(
        (*addresses, values.ctypes.data, rooms.data_ptr(), room, len(own), batch, heads, *sizes, threads),
        dtype=PROBLEM,
    )
    library.relations(problem.ctypes.data)
    return torch.tensor(values.sum(), dtype=dtype), gradients


def _by_position(vectors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same with neighbours in memory, and one distance from every position to the next."""
    vectors = vectors.detach().to(dtype)
    even = vectors.stride(2) == 1 and vectors.stride(0) == vectors.shape[1] * vectors.stride(1)
    # A dimension of size 1 may have any stride in what torch calls contiguous; a view of all as one has not.
    return vectors if even else vectors.contiguous().view(-1).view(vectors.shape)
