"""chunk_terms of chunk_terms.py on a CPU as C loops (vocabulary.c), built on first use.

A row of logits is read from memory once and its gradient written once, where torch operations make some twenty passes.
Ensembles, and a CPU without a C compiler, stay with those.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np
import torch

from train.lamb import compile_library, num_threads
from train.models.families import DecoderInputs
from train.objective.chunk_terms import Chunk, product
from train.objective.relations_native import OPTIONS

SOURCE = Path(__file__).with_name("vocabulary.c")
POINTERS = (
    ("student", "teacher", "student_bias", "teacher_bias"),
    ("row_weights", "target_weights", "targets", "values"),
)


class Problem(ctypes.Structure):
    """Mirror of the C struct."""

    _fields_ = (
        *((name, ctypes.c_void_p) for names in POINTERS for name in names),
        *((name, ctypes.c_int64) for name in ("rows", "vocabulary", "num_targets", "threads")),
        *((name, ctypes.c_double) for name in ("temperature", "kd", "mlm", "mse")),
    )


@functools.cache
def build(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled loops for logits of this dtype, fp32 or fp64; None where no C compiler is found or it fails."""
    return compile_library(SOURCE, {"vocabulary_terms": (ctypes.POINTER(Problem),)}, OPTIONS[dtype])


def native_chunk_terms(library: ctypes.CDLL, chunk: Chunk, values: torch.Tensor) -> torch.Tensor:
    """As chunk_terms, of one teacher or none, on the CPU.

    Args:
        library: of the chunk's dtype.
    """
    tokens, weights = chunk.tokens, chunk.weights
    student, student_bias = _logits(chunk, chunk.student, "student")
    teacher, teacher_bias = _logits(chunk, chunk.teachers[0], "teacher") if chunk.teachers else (None, None)
    of_rows, of_targets, targets = (
        each.contiguous() for each in (tokens.row_weights, tokens.target_weights, tokens.targets)
    )
    rows, vocabulary = student.shape
    counted = targets[of_targets != 0]
    assert ((counted >= 0) & (counted < vocabulary)).all(), "a target outside of the vocabulary"
    by_row = np.zeros((rows, 4))
    pointers = (student, teacher, student_bias, teacher_bias, of_rows, of_targets, targets)
    problem = Problem(
        *(None if each is None else each.data_ptr() for each in pointers),
        by_row.ctypes.data,
        *(rows, vocabulary, targets.shape[0], num_threads()),
        *(weights.temperature, weights.kd, weights.mlm, weights.mse),
    )
    library.vocabulary_terms(problem)
    values += torch.from_numpy(by_row.sum(0)).to(values.dtype)
    return student


def _logits(chunk: Chunk, inputs: DecoderInputs, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(rows, V) before the bias, in a buffer; the bias divided by the temperature."""
    out = chunk.buffer(name)
    product(inputs.features, inputs.weight.t(), out, from_bf16=inputs.from_bf16)
    bias = inputs.bias
    return out, None if bias is None else (bias.to(chunk.dtype) / chunk.weights.temperature).contiguous()
