"""LAMB as the formula is written, in fp64, one process, one tensor after another: the oracle of the tests.

What differs from this is the other side's rounding. Slow, and meant to be read.
"""

from __future__ import annotations

import math

import torch

from .parameters import is_bias_or_norm


class ReferenceLamb:
    """State and step of LAMB over named tensors; arguments as of optimizer.Lamb.

    The formulas: "decoupled", You et al. 2020 (arXiv:1904.00962) algorithm 2 with decay added to the update;
    "deepspeed", DeepSpeed 0.19 csrc/lamb/fused_lamb_cuda_kernel.cu with eps outside the root.
    """

    def __init__(
        self,
        named_parameters: dict[str, torch.Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        adapt_all: bool = False,
        clamp: tuple[float, float] | None = None,
        prenormalize: bool = False,
        bias_correction: bool = True,
        mode: str = "decoupled",
    ) -> None:
        self.parameters = {name: p.detach().double().clone() for name, p in named_parameters.items()}
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.everything = adapt_all or mode == "deepspeed"
        self.clamp = (0.01, 10.0) if mode == "deepspeed" and clamp is None else clamp
        self.prenormalize, self.bias_correction, self.mode = prenormalize, bias_correction, mode
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.step_count = 0
        self.grad_norm = 1.0
        self.trust_ratios: dict[str, float] = {}
        self.updates: dict[str, torch.Tensor] = {}
        """What the last step subtracted from each parameter."""

    def step(self, gradients: dict[str, torch.Tensor]) -> None:
        """One step with the given gradients, one per parameter."""
        self.step_count += 1
        if self.prenormalize:
            self.grad_norm = (
                math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values())) or 1.0
            )
        for name, p in self.parameters.items():
            plain = is_bias_or_norm(name, p.ndim)
            decay = 0.0 if plain and self.mode != "deepspeed" else self.weight_decay
            u, step_size = self._direction(name, gradients[name].double() / self.grad_norm, decay)
            ratio = self._trust_ratio(p, u) if self.everything or not plain else 1.0
            self.trust_ratios[name] = ratio
            self.updates[name] = step_size * (ratio * u)
            p.sub_(self.updates[name])

    def _direction(self, name: str, g: torch.Tensor, decay: float) -> tuple[torch.Tensor, float]:
        beta1, beta2 = self.betas
        m = self.exp_avg[name].mul_(beta1).add_((1 - beta1) * g)
        v = self.exp_avg_sq[name].mul_(beta2).add_((1 - beta2) * g * g)
        decayed = decay * self.parameters[name]
        correction1 = 1 - beta1**self.step_count if self.bias_correction else 1.0
        correction2 = 1 - beta2**self.step_count if self.bias_correction else 1.0
        if self.mode == "deepspeed":
            u = m / (v.sqrt() + self.eps) + decayed
            return u, self.lr * math.sqrt(correction2) / correction1
        u = (m / correction1) / ((v / correction2).sqrt() + self.eps) + decayed
        return u, self.lr

    def _trust_ratio(self, p: torch.Tensor, u: torch.Tensor) -> float:
        norm_p, norm_u = float(p.norm()), float(u.norm())
        if norm_p == 0 or norm_u == 0:
            return 1.0
        ratio = norm_p / norm_u
        return ratio if self.clamp is None else min(max(ratio, self.clamp[0]), self.clamp[1])
