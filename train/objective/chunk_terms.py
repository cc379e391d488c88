"""One chunk of tokens: logits, losses and the gradient by the student's logits, in buffers used again.

All of this is bound by memory, beside matrix products that are bound by arithmetic: so each (rows, V) tensor
is written in place, each exponential is taken once, and normalisers are multiplied in as late as possible,
together with the row's weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from train.models.families import DecoderInputs
from train.objective.token_selection import SelectedTokens


@dataclass(frozen=True)
class VocabularyWeights:
    """What the terms on logits are weighted with."""

    temperature: float
    """T of the soft targets."""
    kd: float
    mlm: float
    mse: float = 0.0


@dataclass
class Workspace:
    """Scratch tensors by name, kept between calls.

    On a CPU a fresh buffer costs more than what is computed in it: every page is faulted in and zeroed.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def get(self, name: str, rows: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(rows, like.shape[0]) of `dtype` on the device of `like`; contents undefined."""
        held = self.tensors.get(name)
        key = (like.shape[0], dtype, like.device)
        # A buffer made under torch.inference_mode cannot be written outside it.
        stale = held is not None and held.is_inference() and not torch.is_inference_mode_enabled()
        fits = held is not None and held.shape[0] >= rows and (held.shape[1], held.dtype, held.device) == key
        if held is None or stale or not fits:
            held = torch.empty(rows, like.shape[0], dtype=dtype, device=like.device)
            self.tensors[name] = held
        return held[:rows]


@dataclass(frozen=True)
class Chunk:
    """What one chunk is computed from."""

    student: DecoderInputs
    """Of this chunk's tokens only, as are the two below."""
    teachers: tuple[DecoderInputs, ...]
    tokens: SelectedTokens
    weights: VocabularyWeights
    """Logits are computed divided by the temperature at once."""
    workspace: Workspace
    dtype: torch.dtype
    """Of logits and sums."""
    gradient_dtype: torch.dtype
    """Of the gradient where it is made for the products; torch operations and C loops return `dtype`."""

    def buffer(self, name: str) -> torch.Tensor:
        rows = self.student.features.shape[0]
        return self.workspace.get(name, rows, self.student.weight, self.dtype)


def chunk_terms(chunk: Chunk, values: torch.Tensor) -> torch.Tensor:
    """Add the chunk's sums of (kd, mlm, mse, agreement) to `values` (4,).

    Returns:
        (rows, V): gradient of the weighted sum of kd, mlm and mse by the student's logits. It lies
        in the workspace, and is undone by the next chunk.
    """
    logits = tempered_logits(chunk.student, 1 / chunk.weights.temperature, chunk.buffer("student"))
    difference = torch.neg(logits, out=chunk.buffer("difference")) if chunk.weights.mse > 0 else None
    logits.sub_(logits.amax(-1, keepdim=True))
    numerators = normalisers = divergence = None
    if chunk.teachers:
        numerators, normalisers, log_numerators, best = _soft_targets(chunk, difference)
        agree = logits.gather(1, best[:, None]).squeeze(1) == 0  # the teacher's choice has the largest logit
        values[3] += (agree & (chunk.tokens.row_weights > 0)).sum()
        if chunk.weights.kd > 0:
            divergence = (
                log_numerators.sub_(logits).mul_(numerators).sum(-1) / normalisers - normalisers.log()
            )
    of_mlm = _mlm_gradient(chunk, logits, values) if chunk.tokens.targets.shape[0] > 0 else None
    if divergence is not None:
        assert numerators is not None
        assert normalisers is not None
        coefficient = chunk.weights.kd * chunk.weights.temperature * chunk.tokens.row_weights
        exponentials = logits.exp_()
        sums = exponentials.sum(-1)
        values[0] += (
            chunk.weights.temperature**2 * ((divergence + sums.log()) * chunk.tokens.row_weights).sum()
        )
        numerators.mul_((coefficient / normalisers)[:, None])
        gradient = exponentials.mul_((coefficient / sums)[:, None]).sub_(numerators)
    elif difference is None:
        assert of_mlm is not None
        return of_mlm
    else:
        gradient = logits.zero_()
    if difference is not None:
        _add_mse(chunk, difference, gradient, values)
    if of_mlm is not None:
        gradient[: of_mlm.shape[0]] += of_mlm
    return gradient


def tempered_logits(inputs: DecoderInputs, scale: float, out: torch.Tensor) -> torch.Tensor:
    """scale * (features @ weight.T + bias), written to `out`."""
    product(inputs.features, inputs.weight.t(), out, from_bf16=inputs.from_bf16)
    if inputs.bias is not None:
        bias = inputs.bias.to(out.dtype) * scale
        return torch.add(bias, out, alpha=scale, out=out)
    return out.mul_(scale) if scale != 1 else out


def product(
    left: torch.Tensor,
    right: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool = False,
    factor: torch.Tensor | None = None,
    *,
    from_bf16: bool = False,
) -> None:
    """out (+)= left @ right; half-precision operands give fp32 sums, multiplied by `factor` where there is one.

    With `from_bf16` a CPU that multiplies bf16 rounds fp32 operands to it; sums and results stay in fp32.
    """
    if left.dtype == out.dtype:
        with _bf16_operands() if from_bf16 else nullcontext():
            if accumulate:
                out.addmm_(left, right)
            else:
                torch.mm(left, right, out=out)
        return
    part = torch.mm(left, right, out_dtype=out.dtype)
    if factor is not None:
        part.mul_(factor)
    if accumulate:
        out += part
    else:
        out.copy_(part)


@contextmanager
def _bf16_operands() -> Iterator[None]:
    """oneDNN's products of fp32 matrices by way of bf16; without an effect where the processor lacks it."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at import
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _soft_targets(
    chunk: Chunk, difference: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Soft targets as numerators (rows, V) and normalisers (rows,), the numerators' logarithms, best token.

    The logarithms lie in the scratch buffer. Adds the teachers' mean logits to `difference`.
    """
    numerators, scratch = chunk.buffer("teacher"), chunk.buffer("scratch")
    for index, teacher in enumerate(chunk.teachers):
        tempered_logits(teacher, 1 / chunk.weights.temperature, scratch)
        if difference is not None:
            difference.add_(scratch, alpha=teacher.share)
        largest, best = scratch.max(-1)
        scratch.sub_(largest[:, None])
        if len(chunk.teachers) == 1:
            torch.exp(scratch, out=numerators)
            return numerators, numerators.sum(-1), scratch, best
        scratch.exp_()
        scratch.mul_((teacher.share / scratch.sum(-1))[:, None])
        if index == 0:
            numerators.copy_(scratch)
        else:
            numerators.add_(scratch)
    # Probabilities that underflow to 0 contribute 0 * log(smallest number) = 0.
    torch.clamp_min(numerators, torch.finfo(chunk.dtype).tiny, out=scratch).log_()
    return numerators, torch.ones_like(chunk.tokens.row_weights), scratch, numerators.argmax(-1)


def _mlm_gradient(chunk: Chunk, logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Gradient (k, V) of the weighted cross entropy at T = 1, in the scratch buffer.

    Args:
        logits: (rows, V) divided by T, less their row's largest.
    """
    count = chunk.tokens.targets.shape[0]
    targets = chunk.tokens.targets[:, None]
    exponentials = torch.mul(logits[:count], chunk.weights.temperature, out=chunk.buffer("scratch")[:count])
    chosen = exponentials.gather(1, targets).squeeze(1)
    sums = exponentials.exp_().sum(-1)
    values[1] += ((sums.log() - chosen) * chunk.tokens.target_weights).sum()
    coefficient = chunk.weights.mlm * chunk.tokens.target_weights
    exponentials.mul_((coefficient / sums)[:, None])
    return exponentials.scatter_add_(1, targets, -coefficient[:, None])


def _add_mse(chunk: Chunk, difference: torch.Tensor, gradient: torch.Tensor, values: torch.Tensor) -> None:
    """`difference` is (z_t - z_s) / T, (rows, V)."""
    squares = torch.linalg.vecdot(difference, difference)
    values[2] += chunk.weights.temperature**2 * (squares * chunk.tokens.row_weights).sum()
    factor = -2 * chunk.weights.mse * chunk.weights.temperature
    gradient.addcmul_(difference, chunk.tokens.row_weights[:, None], value=factor)
