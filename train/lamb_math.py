"""LAMB's arithmetic on flat fp32 slices: two passes with the trust ratios between them.

You et al. 2020, arXiv:1904.00962, algorithm 2, with decoupled decay:

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    u = (m / c1) / (sqrt(v / c2) + eps) + decay p
    p = p - lr (||p|| / ||u||) u

with c1 = 1 - b1^t, c2 = 1 - b2^t (both 1 without bias correction). The first pass updates m and v and sums
the squares of p and u; the second recomputes u, so that no update is ever stored and gradients are left
alone: 24 + 16 bytes of memory traffic per parameter. `lamb_reference.py` is the formula as written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepCoefficients:
    """The scalars of one step, as Python floats."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    correction1: float
    """m is divided by it in the update."""
    correction2: float
    """v is divided by it in the update."""
    step_size: float
    """What multiplies trust ratio x update: the learning rate, with the bias corrections in deepspeed mode."""


def step_coefficients(
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    bias_correction: bool,
    mode: str,
) -> StepCoefficients:
    """The scalars of step number `step` (from 1).

    mode "decoupled" corrects the moments inside the update, as the paper does; "deepspeed" leaves the
    moments as they are and folds both corrections into the step size, outside the trust ratio
    (DeepSpeed 0.19 csrc/lamb/fused_lamb_cuda_kernel.cu).
    """
    correction1 = correction2 = 1.0
    step_size = lr
    if bias_correction:
        correction1, correction2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    if bias_correction and mode == "deepspeed":
        step_size = lr * math.sqrt(correction2) / correction1
        correction1 = correction2 = 1.0
    return StepCoefficients(*betas, eps, weight_decay, correction1, correction2, step_size)


def trust_ratios(sums: torch.Tensor, adapt: torch.Tensor, clamp: tuple[float, float] | None) -> torch.Tensor:
    """||p|| / ||u|| per tensor, 1 where either is 0 or the tensor is not adapted.

    Args:
        sums: (T, 2) fp64 sums of squares of p and u, over all ranks.
        adapt: (T,) bool.
        clamp: (low, high) limits of the ratio, as in DeepSpeed's FusedLamb; the 1s are not clamped.
    Returns:
        (T,) fp32. Division and root are fp64, so that the order of summation (another world size) shows
        only where an fp64 rounding error straddles an fp32 boundary: about 1e-8 of cases.
    """
    squares = sums[:, 0] / sums[:, 1]
    ratios = squares.sqrt()
    if clamp is not None:
        ratios = ratios.clamp(*clamp)
    usable = adapt & (sums[:, 0] > 0) & (sums[:, 1] > 0)
    return torch.where(usable, ratios, 1.0).to(torch.float32)


def update_moments(m: torch.Tensor, v: torch.Tensor, g: torch.Tensor, c: StepCoefficients) -> None:
    """First and second moment, in place; all slices 1-D of one length and dtype."""
    m.mul_(c.beta1).add_(g, alpha=1 - c.beta1)
    v.mul_(c.beta2).addcmul_(g, g, value=1 - c.beta2)


def update_direction(
    p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, c: StepCoefficients, decay: bool, out: torch.Tensor
) -> torch.Tensor:
    """u = (m / c1) / (sqrt(v / c2) + eps) + decay p, written to `out`."""
    torch.sqrt(v, out=out)
    # sqrt(v / c2) = sqrt(v) / sqrt(c2); both corrections then meet in one division of m.
    out.mul_(c.correction1 / math.sqrt(c.correction2)).add_(c.eps * c.correction1)
    torch.div(m, out, out=out)
    if decay and c.weight_decay:
        out.add_(p, alpha=c.weight_decay)
    return out
