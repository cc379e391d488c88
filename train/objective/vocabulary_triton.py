"""chunk_terms of chunk_terms.py on CUDA as one Triton kernel: what vocabulary.c does on a CPU, row by row of logits.

NOT YET RUN ON A GPU: see tests/gpu/test_vocabulary_triton.py for what Triton's interpreter and compiler have shown. So
the first call on a device compares it with the torch operations, which stay where it fails, or differs.

Torch operations move some 40 times the bytes of the logits between the products; this reads them twice, and writes the
gradient in the format of the products.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn import functional

from train.models.families import DecoderInputs
from train.objective.chunk_terms import Chunk, VocabularyWeights, Workspace, chunk_terms
from train.objective.token_selection import SelectedTokens

BLOCK = 1024
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def _tempered(logits, bias, at, vocabulary, scale):
    """Logits divided by the temperature; behind the last one, a number below all."""
    tempered = tl.load(logits + at, mask=at < vocabulary, other=-1e30) * scale
    return tempered + tl.load(bias + at, mask=at < vocabulary, other=0.0)


@triton.jit
def _with(sums, largest_before, largest, logits, temperature):
    """Sums of exponentials over their lane's largest logit, with one more logit in each lane."""
    before = sums * tl.exp(temperature * (largest_before - largest))
    return before + tl.exp(temperature * (logits - largest))


@triton.jit
def _sums(
    student,
    teacher,
    student_bias,
    teacher_bias,
    vocabulary,
    temperature,
    TAUGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one row: the student's largest logit, its exponentials' sums at the temperature and at 1; the teacher's
    largest logit and sum; the sum of its exponentials times the logits' differences; that of the differences' squares;
    1 where both prefer one token. Each lane has a largest logit of its own in the loop, and all are combined after it.
    """
    own_largest = tl.full((BLOCK,), -1e35, tl.float32)
    their_largest = own_largest
    own_sums = tl.zeros((BLOCK,), tl.float32)
    target_sums, their_sums, parts, squares, chosen = own_sums, own_sums, own_sums, own_sums, own_sums
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        own = _tempered(student, student_bias, at, vocabulary, 1.0 / temperature)
        largest = tl.maximum(own_largest, own)
        own_sums = _with(own_sums, own_largest, largest, own, 1.0)
        target_sums = _with(target_sums, own_largest, largest, own, temperature)
        own_largest = largest
        if TAUGHT:
            theirs = _tempered(teacher, teacher_bias, at, vocabulary, 1.0 / temperature)
            chosen = tl.where(theirs > their_largest, own, chosen)
            largest = tl.maximum(their_largest, theirs)
            their_sums = _with(their_sums, their_largest, largest, theirs, 1.0)
            parts = parts * tl.exp(their_largest - largest) + tl.exp(theirs - largest) * (theirs - own)
            squares += (theirs - own) * (theirs - own)
            their_largest = largest
    own_top, their_top = tl.max(own_largest, 0), tl.max(their_largest, 0)
    own_sum = tl.sum(own_sums * tl.exp(own_largest - own_top), 0)
    target_sum = tl.sum(target_sums * tl.exp(temperature * (own_largest - own_top)), 0)
    factors = tl.exp(their_largest - their_top)
    their_sum, parts_sum = tl.sum(their_sums * factors, 0), tl.sum(parts * factors, 0)
    agree = tl.max(((their_largest == their_top) & (chosen == own_top)).to(tl.float32), 0)
    return own_top, own_sum, target_sum, their_top, their_sum, parts_sum, tl.sum(squares, 0), agree


@triton.jit
def _rows_kernel(
    student,
    teacher,
    student_bias,
    teacher_bias,
    row_weights,
    target_weights,
    targets,
    by_row,
    gradient,
    vocabulary,
    stride,
    temperature,
    kd,
    mlm,
    mse,
    TAUGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of logits: weighted kd, mlm, mse and agreement into `by_row`, and the gradient."""
    row = tl.program_id(0).to(tl.int64)
    student += row * vocabulary
    teacher += row * vocabulary
    gradient += row * stride
    by_row += 4 * row
    weight = tl.load(row_weights + row)
    of_target = tl.load(target_weights + row)
    target = tl.load(targets + row)
    own_top, own_sum, target_sum, their_top, their_sum, parts, squares, agree = _sums(
        student, teacher, student_bias, teacher_bias, vocabulary, temperature, TAUGHT, BLOCK
    )
    if TAUGHT:
        squared = temperature * temperature * weight
        divergence = parts / their_sum + own_top - their_top + tl.log(own_sum / their_sum)
        # Not what may be infinite where it is not asked for.
        tl.store(by_row, tl.where(kd > 0, squared * divergence, 0.0))
        tl.store(by_row + 2, tl.where(mse > 0, squared * squares, 0.0))
        tl.store(by_row + 3, tl.where(weight > 0, agree, 0.0))
    cross_entropy = 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        own = _tempered(student, student_bias, at, vocabulary, 1.0 / temperature) - own_top
        is_target = at == target
        logarithms = tl.log(target_sum) - temperature * own
        cross_entropy += tl.sum(tl.where(is_target, of_target * logarithms, 0.0), 0)
        slope = mlm * of_target * (tl.exp(temperature * own) / target_sum - is_target.to(tl.float32))
        if TAUGHT:
            theirs = _tempered(teacher, teacher_bias, at, vocabulary, 1.0 / temperature) - their_top
            apart = kd * (tl.exp(own) / own_sum - tl.exp(theirs) / their_sum)
            apart += tl.where(mse > 0, 2.0 * mse * (own + own_top - theirs - their_top), 0.0)
            slope += temperature * weight * apart
        tl.store(gradient + at, slope.to(gradient.dtype.element_ty), mask=at < vocabulary)
    tl.store(by_row + 1, cross_entropy)


def triton_chunk_terms(chunk: Chunk, values: torch.Tensor) -> torch.Tensor:
    """As chunk_terms, of one teacher or none, fp32 logits and sums; the gradient is of `chunk.gradient_dtype`."""
    tokens, weights = chunk.tokens, chunk.weights
    student, student_bias = _logits(chunk.student, chunk)
    teacher, teacher_bias = _logits(chunk.teachers[0], chunk) if chunk.teachers else (student, student_bias)
    rows, vocabulary = student.shape
    without_target = (0, rows - tokens.targets.shape[0])
    # Rows lie multiples of 16 bytes apart, as cuBLAS's fast kernels for half precision ask for.
    unit = 16 // chunk.gradient_dtype.itemsize
    gradient = student.new_empty(rows, -(-vocabulary // unit) * unit, dtype=chunk.gradient_dtype)
    by_row = student.new_zeros(rows, 4)
    with _launching_on(student.device):
        _rows_kernel[(rows,)](
            student,
            teacher,
            student_bias,
            teacher_bias,
            tokens.row_weights,
            functional.pad(tokens.target_weights, without_target),
            functional.pad(tokens.targets, without_target),
            by_row,
            gradient,
            vocabulary,
            gradient.shape[1],
            weights.temperature,
            weights.kd,
            weights.mlm,
            weights.mse,
            len(chunk.teachers) > 0,
            BLOCK,
            **LAUNCH,
        )
    values += by_row.sum(0)
    return gradient[:, :vocabulary]


def _logits(inputs: DecoderInputs, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, V) fp32 before the bias; the bias (V,) divided by the temperature."""
    features, weight = inputs.features, inputs.weight.t()
    in_fp32 = features.dtype == torch.float32
    logits = torch.mm(features, weight) if in_fp32 else torch.mm(features, weight, out_dtype=torch.float32)
    bias = logits.new_zeros(logits.shape[1]) if inputs.bias is None else inputs.bias.float()
    return logits, bias / chunk.weights.temperature


def _launching_on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def deviation(device: torch.device) -> float:
    """The largest difference from the torch operations in values and gradients of a small problem, over the largest."""
    generator = torch.Generator().manual_seed(0)
    rows, width, vocabulary = 6, 16, BLOCK + 77

    def decoder() -> DecoderInputs:
        draw = lambda *shape: torch.randn(shape, generator=generator).to(device)  # noqa: E731
        return DecoderInputs(draw(rows, width), draw(vocabulary, width), draw(vocabulary))

    weights = torch.linspace(0, 1, rows, device=device)
    tokens = SelectedTokens(
        torch.arange(rows, device=device),
        weights,
        torch.tensor([3, vocabulary - 1], device=device),
        weights[2:4],
    )
    terms = VocabularyWeights(temperature=2.0, kd=5.0, mlm=2.0, mse=0.1)
    taught = Chunk(decoder(), (decoder(),), tokens, terms, Workspace(), torch.float32, torch.float32)
    alone = replace(taught, teachers=(), tokens=tokens.of(slice(0, 2)))
    alone = replace(alone, student=alone.student.of(slice(0, 2)), weights=replace(terms, kd=0.0, mse=0.0))
    largest = 0.0
    for chunk in (taught, alone):
        found, expected = (torch.zeros(4, device=device) for _ in range(2))
        pairs = [(triton_chunk_terms(chunk, found), chunk_terms(chunk, expected)), (found, expected)]
        largest = max(largest, *(float((one - two).abs().max() / two.abs().max()) for one, two in pairs))
    return largest
