"""LAMB's scalars and what the passes over the parameters share.

You et al. 2020, arXiv:1904.00962, algorithm 2, with decoupled decay:

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    u = (m / c1) / (sqrt(v / c2) + eps) + decay p
    p = p - lr (||p|| / ||u||) u

with c1 = 1 - b1^t, c2 = 1 - b2^t (both 1 without bias correction). A first pass updates m and v and sums the
squares of p and u; a second one recomputes u and applies it, so that no tensor's update need be stored and
gradients are left alone: 24 + 16 bytes of memory traffic per fp32 parameter. Both corrections are folded into scalars,

    u = m / (stretch sqrt(v) + shift) + decay p          stretch = c1 / sqrt(c2),   shift = eps c1

which saves two divisions, and their rounding, per element. `reference.py` is the formula as written.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .geometry import Piece, TensorRule


@dataclass(frozen=True)
class StepCoefficients:
    """The scalars of one step, as Python floats."""

    beta1: float
    beta2: float
    stretch: float
    """m is divided by stretch x sqrt(v) + shift."""
    shift: float
    weight_decay: float
    step_size: float
    """Multiplies trust ratio x u: the learning rate; in deepspeed mode with the bias corrections."""


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

    mode "decoupled" corrects the moments inside the update, as the paper does; "deepspeed" leaves them as
    they are and folds both corrections into the step size, outside the trust ratio (DeepSpeed 0.19,
    csrc/lamb/fused_lamb_cuda_kernel.cu).
    """
    beta1, beta2 = betas
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    root = math.sqrt(correction2)
    if mode == "deepspeed":
        return StepCoefficients(beta1, beta2, 1.0, eps, weight_decay, lr * root / correction1)
    return StepCoefficients(beta1, beta2, correction1 / root, eps * correction1, weight_decay, lr)


def trust_ratios(sums: torch.Tensor, adapt: torch.Tensor, clamp: tuple[float, float] | None) -> torch.Tensor:
    """||p|| / ||u|| per tensor, 1 where either is 0 or the tensor is not adapted.

    Args:
        sums: (T, 2) fp64 sums of squares of p and u, over all ranks.
        adapt: (T,) bool.
        clamp: (low, high) limits of the ratio, as in DeepSpeed's FusedLamb; the 1s are not clamped.
    Returns:
        (T,) fp32. Division and root are fp64: another order of summation (another world size) shows only
        where an error of 1e-16 straddles the boundary between two fp32 numbers, once in about 1e8 cases.
    """
    ratios = (sums[:, 0] / sums[:, 1]).sqrt()
    if clamp is not None:
        ratios = ratios.clamp(*clamp)
    usable = adapt & (sums[:, 0] > 0) & (sums[:, 1] > 0)
    return torch.where(usable, ratios, 1.0).to(torch.float32)


@dataclass(frozen=True)
class Part:
    """One parameter the optimizer holds, with its gradient and moments, and the tensors that lie in it.

    A flat ZeRO partition holds many tensors; otherwise there is one part, with one piece, per tensor.
    p, g, m and v are contiguous, of one shape, dtype and device; pieces count their elements as if they were flat.
    """

    p: torch.Tensor
    g: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor
    pieces: tuple[Piece, ...]
    c: StepCoefficients


def pieces_of(
    parts: Sequence[Part], rules: Sequence[TensorRule]
) -> Iterator[tuple[Part, Piece, TensorRule, float]]:
    """Every piece with its part, its rule and its weight decay (0 where the rule has none)."""
    for part in parts:
        for piece in part.pieces:
            rule = rules[piece.tensor]
            yield part, piece, rule, part.c.weight_decay if rule.decay else 0.0


class Passes(ABC):
    """Both passes over the parameters, for tensors of one kind of device."""

    name: str

    @abstractmethod
    def first(
        self,
        parts: Sequence[Part],
        rules: Sequence[TensorRule],
        sums: torch.Tensor,
        grad_norm: torch.Tensor | None,
    ) -> None:
        """Update the moments; add the sums of squares of p and u to `sums`, where a tensor is adapted.

        Args:
            sums: (T, 2) fp64.
            grad_norm: 0-dimensional; gradients are divided by it. None: they are taken as they are.
        """

    @abstractmethod
    def second(self, parts: Sequence[Part], rules: Sequence[TensorRule], ratios: torch.Tensor) -> None:
        """p = p - step_size x ratio x u, after `first` of the same parts; ratios: (T,) fp32."""

    def both(
        self,
        parts: Sequence[Part],
        rules: Sequence[TensorRule],
        adapted: torch.Tensor,
        clamp: tuple[float, float] | None,
        grad_norm: torch.Tensor | None,
    ) -> torch.Tensor:
        """One pass after the other, where this rank holds all of every tensor.

        Args:
            adapted: (T,) bool, what the rules say, on the parameters' device.
            clamp: see trust_ratios.
        Returns:
            (T,) fp32 trust ratios.
        """
        sums = torch.zeros(len(rules), 2, dtype=torch.float64, device=adapted.device)
        self.first(parts, rules, sums, grad_norm)
        ratios = trust_ratios(sums, adapted, clamp)
        self.second(parts, rules, ratios)
        return ratios
