"""The vocabulary part of the objective, in one pass over chunks of tokens.

For each chunk both decoders' logits are computed into buffers that the next chunk uses again; the losses,
top-1 agreement and the gradients of features, decoder weight and bias come out, and the logits are gone. The
gradients are computed in the forward pass, because it alone has the logits at hand; the backward pass only
multiplies them by the incoming gradient (the loss scale and DeepSpeed's 1/accumulation arrive there).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from train.models.families import DecoderInputs
from train.objective.chunk_terms import Chunk, VocabularyWeights, Workspace, chunk_terms, product
from train.objective.tied_embedding import TiedGradient
from train.objective.token_selection import SelectedTokens
from train.objective.vocabulary_native import build, native_chunk_terms

CPU_BUFFER_BYTES = 64 * 2**20
GPU_BUFFER_BYTES = 256 * 2**20
TRITON_DEVIATION = 1e-4
"""Of the kernel from torch operations, in fp32, whose roundings add up to some 1e-6."""
ChunkTerms = Callable[[Chunk, torch.Tensor], torch.Tensor]
HALF_SCALE = 64.0
"""Lifts the small entries of a half-precision logit gradient out of fp16's subnormals; products are summed in fp32."""
HALF_LIMIT = 32_768.0
"""Below fp16's largest number, 65,504. The gradients of KD and MLM are at most kd T + mlm times HALF_SCALE, that of MSE
has no bound: where this could be passed, each chunk is scaled to stay below it."""


@dataclass(frozen=True)
class VocabularyTerms:
    """Results of `vocabulary_loss`: scalars, fp32 (fp64 for fp64 features); only `loss` has a gradient."""

    loss: torch.Tensor
    kd: torch.Tensor
    mlm: torch.Tensor
    mse: torch.Tensor
    top1_agreement: torch.Tensor


@torch.compiler.disable
def vocabulary_loss(
    student: DecoderInputs,
    teachers: Sequence[DecoderInputs],
    tokens: SelectedTokens,
    weights: VocabularyWeights,
    *,
    chunk_tokens: int | None = None,
    workspace: Workspace | None = None,
    tied: TiedGradient | None = None,
) -> VocabularyTerms:
    """kd T^2 KL + mlm CE + mse |z_s - z_t|^2 over N tokens, chunk by chunk.

    One backward pass only: it hands over the gradients that the forward pass made.

    Args:
        student: of N tokens; its features, weight and bias have gradients.
        teachers: of the same tokens; tempered probabilities are averaged by share.
        tokens: targets and the weights in the means; every token has a target where there is no teacher.
        weights: of the terms. With `mlm` 0 the targets are not read.
        chunk_tokens: rows of logits that exist at once; None for what fills 64 MiB (GPU: 256 MiB) per buffer.
        workspace: buffers to use again; None makes them afresh.
        tied: takes the gradient of the weight, for the embedding's backward pass to return; None returns it.
    """
    features, weight, bias = student.features, student.weight, student.bias
    if weights.mlm == 0:
        tokens = tokens.without_targets()
    assert teachers or tokens.targets.shape[0] == features.shape[0]
    if not teachers:
        weights = replace(weights, kd=0.0, mse=0.0)
    if weights.kd == 0:
        weights = replace(weights, temperature=1.0)
    # A GPU's allocator keeps freed blocks at hand; holding them would only take memory from activations.
    kept = workspace if workspace is not None and features.device.type == "cpu" else Workspace()
    chunked = _Pass(
        tuple(teachers),
        tokens,
        weights,
        chunk_rows(features.shape[0], weight, chunk_tokens),
        kept,
    )
    if not torch.is_grad_enabled():  # autograd would ask for the gradients all the same
        features, weight, bias = features.detach(), weight.detach(), None if bias is None else bias.detach()
    loss, values = _VocabularyLoss.apply(features, weight, bias, chunked, tied)
    return VocabularyTerms(loss, *values.unbind())


def chunk_rows(num_rows: int, weight: torch.Tensor, chunk_tokens: int | None = None) -> int:
    """Rows per chunk: at most `chunk_tokens` (or what fills one fp32 buffer), in chunks of equal size."""
    if chunk_tokens is None:
        size = CPU_BUFFER_BYTES if weight.device.type == "cpu" else GPU_BUFFER_BYTES
        chunk_tokens = max(1, size // (4 * weight.shape[0]))
    num_chunks = max(1, -(-num_rows // chunk_tokens))
    return max(1, -(-num_rows // num_chunks))


@functools.cache
def fastest_terms(device: torch.device, dtype: torch.dtype) -> ChunkTerms:
    """What computes a chunk of one teacher or none, in logits of `dtype`: tried when it is first asked for."""
    if device.type == "cpu" and (library := build(dtype)) is not None:
        return functools.partial(native_chunk_terms, library)
    if device.type == "cuda" and dtype == torch.float32:
        try:
            from train.objective.vocabulary_triton import deviation, triton_chunk_terms

            if (found := deviation(device)) < TRITON_DEVIATION:
                return triton_chunk_terms
            reason = f"its results differ from theirs by {found:.1e}"
        except Exception as error:  # of Triton, a compiler, the linker, the driver, a full or read-only disk
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        warnings.warn(
            "the losses over the vocabulary run in plain torch operations on this GPU, more slowly: Triton cannot run "
            f"its kernel ({reason}); it needs a C compiler and Python's headers (apt install gcc python3-dev)",
            stacklevel=2,
        )
    return chunk_terms


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        features: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        chunked: _Pass,
        tied: TiedGradient | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(features.device.type, enabled=False):
            student = DecoderInputs(features, weight, bias)
            values, ctx.gradients, ctx.unit = chunked.run(student, tuple(ctx.needs_input_grad[:3]))
        ctx.tied = tied
        ctx.dtypes = (features.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(values)
        kd, mlm, mse, _ = values
        weights = chunked.weights
        return weights.kd * kd + weights.mlm * mlm + weights.mse * mse, values

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("the fused loss keeps its gradients for one backward pass; run forward again")
        gradients, ctx.gradients = ctx.gradients, None
        # In fp32 and in place: fp16 would underflow before the loss scale, and a second tensor of the
        # decoder's size would cost a pass over fresh memory.
        scale = grad_loss * ctx.unit
        of_features, of_weight, of_bias = (
            None if gradient is None else gradient.mul_(scale) for gradient in gradients
        )
        if ctx.tied is not None:
            ctx.tied.gradient, of_weight = of_weight, None
        scaled = (
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip((of_features, of_weight, of_bias), ctx.dtypes, strict=True)
        )
        return (*scaled, None, None)


@dataclass(frozen=True)
class _Pass:
    """Arguments of one pass, see `vocabulary_loss`."""

    teachers: tuple[DecoderInputs, ...]
    tokens: SelectedTokens
    weights: VocabularyWeights
    chunk_rows: int
    workspace: Workspace

    def run(
        self, student: DecoderInputs, needs_gradient: tuple[bool, ...]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...], torch.Tensor]:
        """Values (kd, mlm, mse, top1_agreement); gradients (features, weight, bias); their common factor."""
        dtype = torch.promote_types(student.features.dtype, torch.float32)
        student = student.in_dtype(dtype)
        features, weight = student.features, student.weight
        teachers = tuple(teacher.in_dtype(dtype) for teacher in self.teachers)
        tokens, unit = self._unit_weights(dtype, half=student.from_bf16 or weight.dtype != dtype)
        dropped = self._dropped_rows()
        values = torch.zeros(4, dtype=dtype, device=features.device)
        grad_features = torch.empty_like(features, dtype=dtype) if needs_gradient[0] else None
        grad_weight = torch.empty_like(weight, dtype=dtype) if needs_gradient[1] else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=dtype) if needs_gradient[2] else None
        if grad_weight is not None and features.shape[0] == 0:
            grad_weight.zero_()
        terms = fastest_terms(features.device, dtype) if len(teachers) < 2 and len(features) else chunk_terms
        gradient_dtype = dtype if self._is_scaled(weight.dtype) else weight.dtype
        for start in range(0, features.shape[0], self.chunk_rows):
            rows = slice(start, start + self.chunk_rows)
            chunk = Chunk(
                student=_slice(student, rows, dropped),
                teachers=tuple(_slice(teacher, rows, dropped) for teacher in teachers),
                tokens=tokens.of(rows),
                weights=self.weights,
                workspace=self.workspace,
                dtype=dtype,
                gradient_dtype=gradient_dtype,
            )
            gradient = terms(chunk, values)
            if grad_bias is not None:
                grad_bias += gradient.sum(0, dtype=dtype)
            operand, factor = self._operand(gradient, weight.dtype)
            if grad_features is not None:
                product(operand, weight, grad_features[rows], factor=factor, from_bf16=student.from_bf16)
            if grad_weight is not None:
                product(
                    operand.t(),
                    chunk.student.features,
                    grad_weight,
                    accumulate=start > 0,
                    factor=factor,
                    from_bf16=student.from_bf16,
                )
        values[:3] *= unit
        values[3] /= (self.tokens.row_weights > 0).sum().clamp_min(1)
        return values, (grad_features, grad_weight, grad_bias), unit

    def _operand(
        self, gradient: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradient (rows, V) in the dtype of the products, and what these are to be multiplied with, or None.

        No loss scale helps against an overflow here: it arrives in the backward pass. Overwrites `gradient`.
        """
        if not self._is_scaled(dtype):
            return _as_operand(gradient, dtype), None
        smallest, largest = gradient.aminmax()
        room = HALF_LIMIT / torch.maximum(largest, -smallest)
        power = room.log2().floor().clamp_max(0.0).exp2()  # of two, so that nothing is rounded
        return _as_operand(gradient.mul_(power), dtype), 1 / power

    def _is_scaled(self, dtype: torch.dtype) -> bool:
        """Whether gradients could pass the largest number of `dtype`, that of the products."""
        weights = self.weights
        bound = HALF_SCALE * (weights.kd * weights.temperature + weights.mlm)
        return dtype == torch.float16 and (weights.mse > 0 or bound > HALF_LIMIT)

    def _dropped_rows(self) -> torch.Tensor:
        """(N, 1) bool, True for rows that count in no mean (padding)."""
        kept = self.tokens.row_weights > 0
        kept[: self.tokens.targets.shape[0]] |= self.tokens.target_weights > 0
        return ~kept[:, None]

    def _unit_weights(self, dtype: torch.dtype, half: bool) -> tuple[SelectedTokens, torch.Tensor]:
        """Weights in the means over a common factor that keeps half-precision gradients in range.

        The largest becomes a power of two: the entries at targets, all alike, would all be rounded the same way.
        """
        of_rows, of_targets = self.tokens.row_weights.to(dtype), self.tokens.target_weights.to(dtype)
        unit = torch.ones((), dtype=dtype, device=of_rows.device)
        if half:
            floor = of_rows.new_full((1,), 1e-30)
            unit = torch.cat([of_rows, of_targets, floor]).max() / HALF_SCALE
            of_rows, of_targets = of_rows / unit, of_targets / unit
        return replace(self.tokens, row_weights=of_rows, target_weights=of_targets), unit


def _as_operand(gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gradient (rows, V) in `dtype`; the rows of a copy lie multiples of 16 bytes apart, as cuBLAS's fast kernels
    for half precision ask for."""
    if gradient.dtype == dtype:
        return gradient
    rows, vocabulary = gradient.shape
    unit = 16 // dtype.itemsize
    padded = gradient.new_empty(rows, -(-vocabulary // unit) * unit, dtype=dtype)
    return padded[:, :vocabulary].copy_(gradient)


def _slice(model: DecoderInputs, rows: slice, dropped: torch.Tensor) -> DecoderInputs:
    """One chunk; zeros for rows that are dropped, because a weight of 0 times a NaN would be a NaN."""
    part = model.of(rows)
    return replace(part, features=part.features.masked_fill(dropped[rows], 0.0))
