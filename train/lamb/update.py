"""The update: its formula, the scalars of a step, and both passes over the parameters in plain torch.

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
from dataclasses import dataclass, replace

import torch

from .parameters import TensorRule
from .zero_layout import Fragment

CHUNK_PER_THREAD = 65_536
"""Elements per core and operation: seven fp32 buffers of it are 1.8 MB, about one core's second-level cache."""


@dataclass(frozen=True)
class Coefficients:
    """The scalars of one step, as Python floats."""

    beta1: float
    beta2: float
    stretch: float
    """m is divided by stretch x sqrt(v) + shift."""
    shift: float
    weight_decay: float
    step_size: float
    """Multiplies trust ratio x u: the learning rate; in deepspeed mode with the bias corrections."""


def coefficients(
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    bias_correction: bool,
    mode: str,
) -> Coefficients:
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
        return Coefficients(beta1, beta2, 1.0, eps, weight_decay, lr * root / correction1)
    return Coefficients(beta1, beta2, correction1 / root, eps * correction1, weight_decay, lr)


def trust_ratios(sums: torch.Tensor, adapt: torch.Tensor, clamp: tuple[float, float] | None) -> torch.Tensor:
    """||p|| / ||u|| per tensor, 1 where either is 0 or the tensor is not adapted.

    Args:
        sums: (T, 2) fp64 sums of squares of p and u, over all ranks.
        adapt: (T,) bool.
        clamp: (low, high) limits of the ratio, as in DeepSpeed's FusedLamb; the 1s are not clamped.
    Returns:
        (T,) fp32, at most its largest number. Division and root are fp64: another order of summation (another world
        size) shows only where an error of 1e-16 straddles the boundary between two fp32 numbers, once in about 1e8
        cases.
    """
    ratios = (sums[:, 0] / sums[:, 1]).sqrt()
    if clamp is not None:
        ratios = ratios.clamp(*clamp)
    # An infinite one would make NaNs of updates of 0.
    ratios = ratios.clamp(max=torch.finfo(torch.float32).max)
    usable = adapt & (sums[:, 0] > 0) & (sums[:, 1] > 0)
    return torch.where(usable, ratios, 1.0).to(torch.float32)


@dataclass(frozen=True)
class Buffers:
    """One parameter the optimizer holds, with its gradient and moments, and the tensors that lie in it.

    A flat ZeRO partition holds many tensors; otherwise there is one parameter, with one fragment, per tensor.
    p, g, m and v are contiguous, of one shape, dtype and device; fragments count their elements as if they were flat.
    """

    p: torch.Tensor
    g: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor
    fragments: tuple[Fragment, ...]
    c: Coefficients


def fragments_of(
    buffers: Sequence[Buffers], rules: Sequence[TensorRule]
) -> Iterator[tuple[Buffers, Fragment, TensorRule, Coefficients]]:
    """Every fragment with its buffers, its rule and its scalars (no weight decay where the rule has none)."""
    for one in buffers:
        plain = replace(one.c, weight_decay=0.0)
        for fragment in one.fragments:
            rule = rules[fragment.tensor]
            yield one, fragment, rule, one.c if rule.decay else plain


class Kernel(ABC):
    """Both passes over the parameters, for tensors of one kind of device."""

    name: str

    @abstractmethod
    def first_pass(
        self,
        buffers: Sequence[Buffers],
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
    def second_pass(
        self, buffers: Sequence[Buffers], rules: Sequence[TensorRule], ratios: torch.Tensor
    ) -> None:
        """p = p - step_size x ratio x u, after the first pass over the same buffers; ratios: (T,) fp32."""

    def both_passes(
        self,
        buffers: Sequence[Buffers],
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
        self.first_pass(buffers, rules, sums, grad_norm)
        ratios = trust_ratios(sums, adapted, clamp)
        self.second_pass(buffers, rules, ratios)
        return ratios


class EagerKernel(Kernel):
    """Both passes over any device and dtype with torch operations: what runs where there is no fused kernel.

    On a CPU the elements go through in chunks that stay in the cores' caches, since each of the dozen operations
    would otherwise travel to memory and back. A chunk is as many elements as torch's threads take at
    32K-64K each: torch cuts an operation evenly among its threads, so that each core works on the same part of
    the chunk in every operation.
    """

    name = "eager"

    def __init__(self) -> None:
        self._scratch: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, ...]] = {}

    def first_pass(
        self,
        buffers: Sequence[Buffers],
        rules: Sequence[TensorRule],
        sums: torch.Tensor,
        grad_norm: torch.Tensor | None,
    ) -> None:
        for one, fragment, rule, c in fragments_of(buffers, rules):
            for a, b, u, w, wide in self._chunks(one.p, fragment):
                p, g, m, v = (x.view(-1)[a:b] for x in (one.p, one.g, one.m, one.v))
                if grad_norm is not None:
                    g = torch.div(g, grad_norm, out=w)
                m.lerp_(g, 1 - c.beta1)
                v.mul_(c.beta2).addcmul_(g, g, value=1 - c.beta2)
                if rule.adapt:
                    _direction(p, m, v, c, u)
                    sums[fragment.tensor, 0] += _sum_squares(p, wide)
                    sums[fragment.tensor, 1] += _sum_squares(u, wide)

    def second_pass(
        self, buffers: Sequence[Buffers], rules: Sequence[TensorRule], ratios: torch.Tensor
    ) -> None:
        for one, fragment, _, c in fragments_of(buffers, rules):
            factor = (ratios[fragment.tensor].double() * c.step_size).to(one.p.dtype)
            for a, b, u, _, _ in self._chunks(one.p, fragment):
                p, m, v = (x.view(-1)[a:b] for x in (one.p, one.m, one.v))
                _direction(p, m, v, c, u)
                p.addcmul_(u, factor, value=-1)

    def sum_squares(self, buffers: Sequence[Buffers], device: torch.device) -> torch.Tensor:
        """The sum of squares of all gradients on this rank: 0-dimensional fp64 on `device`."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        for one in buffers:
            for fragment in one.fragments:
                for a, b, _, _, wide in self._chunks(one.g, fragment):
                    total += _sum_squares(one.g.view(-1)[a:b], wide)
        return total

    def _chunks(
        self, like: torch.Tensor, fragment: Fragment
    ) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Bounds of each chunk of a fragment with two buffers of its length and an fp64 one."""
        start, stop = fragment.start, fragment.stop
        size = CHUNK_PER_THREAD * torch.get_num_threads() if like.device.type == "cpu" else stop - start
        key = (like.device, like.dtype)
        if key not in self._scratch or self._scratch[key][0].numel() < size:
            wide = torch.empty(size, dtype=torch.float64, device=like.device)
            self._scratch[key] = (like.new_empty(size), like.new_empty(size), wide)
        u, w, wide = self._scratch[key]
        for a in range(start, stop, size):
            b = min(a + size, stop)
            yield a, b, u[: b - a], w[: b - a], wide[: b - a]


def _direction(
    p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, c: Coefficients, u: torch.Tensor
) -> torch.Tensor:
    """m / (stretch sqrt(v) + shift) + decay p, written to u."""
    # How these round depends on torch's build and the processor: torch.sqrt may be MKL's, which is up to an ulp off,
    # and add with alpha and addcmul round once or twice. On one processor they round alike wherever an element lies.
    torch.sqrt(v, out=u)
    torch.add(u.new_full((), c.shift), u, alpha=c.stretch, out=u)
    torch.div(m, u, out=u)
    return u.add_(p, alpha=c.weight_decay) if c.weight_decay else u


def _sum_squares(x: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    # Squares of fp32 numbers are exact in fp64, so that only the additions round.
    wide.copy_(x)
    return torch.dot(wide, wide)
