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

from train.models.families import DecoderInputs
from train.objective.chunk_terms import Chunk, VocabularyWeights, Workspace, chunk_terms
from train.objective.token_selection import SelectedTokens

BLOCK = 2048
LAUNCH = {"num_warps": 16, "enable_fp_fusion": True}


@triton.jit
def _block(logits, bias, at, inside, scale, BIAS: tl.constexpr):
    """Logits divided by the temperature; behind the last one, a number below all."""
    tempered = tl.load(logits + at, mask=inside, other=-1e30) * scale
    if BIAS:
        tempered += tl.load(bias + at, mask=inside, other=0.0)
    return tempered


@triton.jit(do_not_specialize=["num_targets"])  # it differs from chunk to chunk
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
    num_targets,
    temperature,
    kd,
    mlm,
    mse,
    TAUGHT: tl.constexpr,
    KD: tl.constexpr,
    MSE: tl.constexpr,
    STUDENT_BIAS: tl.constexpr,
    TEACHER_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * vocabulary
    teacher += row * vocabulary
    gradient += row * stride
    scale = 1.0 / temperature
    weight = tl.load(row_weights + row)
    of_target = tl.load(target_weights + row, mask=row < num_targets, other=0.0)
    target = tl.load(targets + row, mask=row < num_targets, other=0)

    # Each lane has a largest logit of its own so far, by which its sums are scaled; lanes are combined after the loop.
    own_largest = tl.full((BLOCK,), -1e35, tl.float32)
    their_largest = own_largest
    own_sums = tl.zeros((BLOCK,), tl.float32)
    target_sums, their_sums, parts, squares, chosen = own_sums, own_sums, own_sums, own_sums, own_sums
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        own = _block(student, student_bias, at, at < vocabulary, scale, STUDENT_BIAS)
        largest = tl.maximum(own_largest, own)
        own_sums = own_sums * tl.exp(own_largest - largest) + tl.exp(own - largest)
        target_sums = target_sums * tl.exp(temperature * (own_largest - largest))
        target_sums += tl.exp(temperature * (own - largest))
        own_largest = largest
        if TAUGHT:
            theirs = _block(teacher, teacher_bias, at, at < vocabulary, scale, TEACHER_BIAS)
            chosen = tl.where(theirs > their_largest, own, chosen)
            largest = tl.maximum(their_largest, theirs)
            factor, exponentials = tl.exp(their_largest - largest), tl.exp(theirs - largest)
            their_sums = their_sums * factor + exponentials
            parts = parts * factor + exponentials * (theirs - own)
            if MSE:
                squares += (theirs - own) * (theirs - own)
            their_largest = largest
    own_top = tl.max(own_largest, 0)
    own_sum = tl.sum(own_sums * tl.exp(own_largest - own_top), 0)
    target_sum = tl.sum(target_sums * tl.exp(temperature * (own_largest - own_top)), 0)
    by_target = mlm * of_target / target_sum
    if TAUGHT:
        their_top = tl.max(their_largest, 0)
        factors = tl.exp(their_largest - their_top)
        their_sum = tl.sum(their_sums * factors, 0)
        divergence = (
            tl.sum(parts * factors, 0) / their_sum + own_top - their_top + tl.log(own_sum / their_sum)
        )
        agree = tl.max(((their_largest == their_top) & (chosen == own_top)).to(tl.float32), 0)
        tl.store(by_row + 4 * row, temperature * temperature * weight * divergence if KD else 0.0)
        tl.store(by_row + 4 * row + 2, temperature * temperature * weight * tl.sum(squares, 0))
        tl.store(by_row + 4 * row + 3, tl.where(weight > 0, agree, 0.0))
        by_own, by_their = kd * temperature * weight / own_sum, kd * temperature * weight / their_sum
    else:
        tl.store(by_row + 4 * row, 0.0)
        tl.store(by_row + 4 * row + 2, 0.0)
        tl.store(by_row + 4 * row + 3, 0.0)

    cross_entropy = 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        own = _block(student, student_bias, at, at < vocabulary, scale, STUDENT_BIAS)
        is_target = (at == target) & (row < num_targets)
        logarithms = tl.log(target_sum) - temperature * (own - own_top)
        cross_entropy += tl.sum(tl.where(is_target, of_target * logarithms, 0.0), 0)
        slope = by_target * tl.exp(temperature * (own - own_top)) - tl.where(is_target, mlm * of_target, 0.0)
        if TAUGHT:
            theirs = _block(teacher, teacher_bias, at, at < vocabulary, scale, TEACHER_BIAS)
            slope += by_own * tl.exp(own - own_top) - by_their * tl.exp(theirs - their_top)
            if MSE:
                slope += 2.0 * mse * temperature * weight * (own - theirs)
        tl.store(gradient + at, slope.to(gradient.dtype.element_ty), mask=at < vocabulary)
    tl.store(by_row + 4 * row + 1, cross_entropy)


def triton_chunk_terms(chunk: Chunk, values: torch.Tensor) -> torch.Tensor:
    """As chunk_terms, of one teacher or none, fp32 logits and sums; the gradient is of `chunk.gradient_dtype`."""
    tokens, weights = chunk.tokens, chunk.weights
    student, student_bias = _logits(chunk.student, chunk)
    teacher, teacher_bias = _logits(chunk.teachers[0], chunk) if chunk.teachers else (student, None)
    rows, vocabulary = student.shape
    # Rows lie multiples of 16 bytes apart, as cuBLAS's fast kernels for half precision ask for.
    unit = 16 // chunk.gradient_dtype.itemsize
    gradient = student.new_empty(rows, -(-vocabulary // unit) * unit, dtype=chunk.gradient_dtype)
    by_row = student.new_empty(rows, 4)
    with _launching_on(student.device):
        _rows_kernel[(rows,)](
            student,
            teacher,
            student if student_bias is None else student_bias,
            student if teacher_bias is None else teacher_bias,
            tokens.row_weights,
            tokens.target_weights,
            tokens.targets,
            by_row,
            gradient,
            vocabulary,
            gradient.shape[1],
            tokens.targets.shape[0],
            weights.temperature,
            weights.kd,
            weights.mlm,
            weights.mse,
            len(chunk.teachers) > 0,
            weights.kd > 0,
            weights.mse > 0,
            student_bias is not None,
            teacher_bias is not None,
            BLOCK,
            **LAUNCH,
        )
    values += by_row.sum(0)
    return gradient[:, :vocabulary]


def _logits(inputs: DecoderInputs, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(rows, V) fp32 before the bias; the bias divided by the temperature."""
    features, weight = inputs.features, inputs.weight.t()
    in_fp32 = features.dtype == torch.float32
    logits = torch.mm(features, weight) if in_fp32 else torch.mm(features, weight, out_dtype=torch.float32)
    return logits, None if inputs.bias is None else inputs.bias.float() / chunk.weights.temperature


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
