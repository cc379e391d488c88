"""One chunk of tokens: logits, losses and the gradient by the student's logits, in buffers used again.

All of this is bound by memory, beside matrix products that are bound by arithmetic: so each (rows, V) tensor
is written in place, each exponential is taken once, and normalisers are multiplied in as late as possible,
together with the row's weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class DecoderRows:
    """One model's decoder and its inputs for the chosen tokens."""

    features: torch.Tensor
    """(N, width), any float dtype."""
    weight: torch.Tensor
    """(vocabulary, width)."""
    bias: torch.Tensor | None
    """(vocabulary,)."""
    share: float = 1.0
    """Weight in an ensemble's average; the shares of one ensemble add up to 1."""

    def in_dtype(self, dtype: torch.dtype) -> DecoderRows:
        """Operands of the matrix products whose results are wanted in `dtype`.

        Half precision stays as it is on a GPU, which sums in fp32 anyway; a CPU has no such products to gain
        from everywhere, and gets them in `dtype`.
        """
        weight = self.weight
        if weight.device.type == "cpu" or weight.dtype not in (torch.float16, torch.bfloat16):
            weight = weight.to(dtype)
        return DecoderRows(self.features.to(weight.dtype), weight, self.bias, self.share)


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

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        return Workspace()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Workspace, ())


@dataclass(frozen=True)
class Chunk:
    """What one chunk is computed from."""

    student: DecoderRows
    """Of this chunk's rows only, as are all below."""
    teachers: tuple[DecoderRows, ...]
    row_weights: torch.Tensor
    """(rows,) in the KD and MSE means."""
    targets: torch.Tensor
    """(k,) int64 original tokens of the first k <= rows rows."""
    target_weights: torch.Tensor
    """(k,)."""
    temperature: float
    """Logits are computed divided by it at once."""
    kd_weight: float
    mlm_weight: float
    mse_weight: float
    workspace: Workspace
    dtype: torch.dtype
    """Of logits and sums."""

    def buffer(self, name: str) -> torch.Tensor:
        rows = self.student.features.shape[0]
        return self.workspace.get(name, rows, self.student.weight, self.dtype)


def chunk_terms(chunk: Chunk, values: torch.Tensor) -> torch.Tensor:
    """Add the chunk's sums of (kd, mlm, mse, agreement) to `values` (4,).

    Returns:
        (rows, V): gradient of kd_weight kd + mlm_weight mlm + mse_weight mse by the student's logits. It lies
        in the workspace, and is undone by the next chunk.
    """
    logits = tempered_logits(chunk.student, 1 / chunk.temperature, chunk.buffer("student"))
    difference = torch.neg(logits, out=chunk.buffer("difference")) if chunk.mse_weight > 0 else None
    logits.sub_(logits.amax(-1, keepdim=True))
    numerators = normalisers = divergence = None
    if chunk.teachers:
        numerators, normalisers, log_numerators, best = _soft_targets(chunk, difference)
        agree = logits.gather(1, best[:, None]).squeeze(1) == 0  # the teacher's choice has the largest logit
        values[3] += (agree & (chunk.row_weights > 0)).sum()
        if chunk.kd_weight > 0:
            divergence = (
                log_numerators.sub_(logits).mul_(numerators).sum(-1) / normalisers - normalisers.log()
            )
    of_mlm = _mlm_gradient(chunk, logits, values) if chunk.targets.shape[0] > 0 else None
    if divergence is not None:
        assert numerators is not None
        assert normalisers is not None
        coefficient = chunk.kd_weight * chunk.temperature * chunk.row_weights
        exponentials = logits.exp_()
        sums = exponentials.sum(-1)
        values[0] += chunk.temperature**2 * ((divergence + sums.log()) * chunk.row_weights).sum()
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


def tempered_logits(rows: DecoderRows, scale: float, out: torch.Tensor) -> torch.Tensor:
    """scale * (features @ weight.T + bias), written to `out`."""
    product(rows.features, rows.weight.t(), out)
    if rows.bias is not None:
        bias = rows.bias.to(out.dtype) * scale
        return torch.add(bias, out, alpha=scale, out=out)
    return out.mul_(scale) if scale != 1 else out


def product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, accumulate: bool = False) -> None:
    """out (+)= left @ right; half-precision operands give fp32 sums."""
    if left.dtype == out.dtype:
        if accumulate:
            out.addmm_(left, right)
        else:
            torch.mm(left, right, out=out)
        return
    part = torch.mm(left, right, out_dtype=out.dtype)
    if accumulate:
        out += part
    else:
        out.copy_(part)


def _soft_targets(
    chunk: Chunk, difference: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Soft targets as numerators (rows, V) and normalisers (rows,), the numerators' logarithms, best token.

    The logarithms lie in the scratch buffer. Adds the teachers' mean logits to `difference`.
    """
    numerators, scratch = chunk.buffer("teacher"), chunk.buffer("scratch")
    for index, teacher in enumerate(chunk.teachers):
        tempered_logits(teacher, 1 / chunk.temperature, scratch)
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
    return numerators, torch.ones_like(chunk.row_weights), scratch, numerators.argmax(-1)


def _mlm_gradient(chunk: Chunk, logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Gradient (k, V) of the weighted cross entropy at T = 1, in the scratch buffer.

    Args:
        logits: (rows, V) divided by T, less their row's largest.
    """
    count = chunk.targets.shape[0]
    targets = chunk.targets[:, None]
    exponentials = torch.mul(logits[:count], chunk.temperature, out=chunk.buffer("scratch")[:count])
    chosen = exponentials.gather(1, targets).squeeze(1)
    sums = exponentials.exp_().sum(-1)
    values[1] += ((sums.log() - chosen) * chunk.target_weights).sum()
    coefficient = chunk.mlm_weight * chunk.target_weights
    exponentials.mul_((coefficient / sums)[:, None])
    return exponentials.scatter_add_(1, targets, -coefficient[:, None])


def _add_mse(chunk: Chunk, difference: torch.Tensor, gradient: torch.Tensor, values: torch.Tensor) -> None:
    """`difference` is (z_t - z_s) / T, (rows, V)."""
    squares = torch.linalg.vecdot(difference, difference)
    values[2] += chunk.temperature**2 * (squares * chunk.row_weights).sum()
    factor = -2 * chunk.mse_weight * chunk.temperature
    gradient.addcmul_(difference, chunk.row_weights[:, None], value=factor)
