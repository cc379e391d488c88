"""What Lamb is measured against: LAMB as a per-tensor loop and as torch foreach operations.

Both compute one trust ratio per parameter they are given, as every LAMB published for torch does. Handed a
flat ZeRO partition, that is one ratio per partition: the error which train.lamb.optimizer removes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class _PlainLamb(torch.optim.Optimizer):
    """One group; state step, exp_avg and exp_avg_sq per parameter."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float, weight_decay: float = 0.01) -> None:
        defaults = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def _moments(self, parameter: torch.Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        return state


class LoopLamb(_PlainLamb):
    """You et al. 2020, arXiv:1904.00962, algorithm 2, one tensor after another."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._moments(p)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                correction1, correction2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
                u = (m / correction1) / ((v / correction2).sqrt() + group["eps"]) + group["weight_decay"] * p
                norm_p, norm_u = p.norm(), u.norm()
                ratio = torch.where((norm_p > 0) & (norm_u > 0), norm_p / norm_u, 1.0)
                p.sub_(u.mul_(group["lr"] * ratio))


class ForeachLamb(_PlainLamb):
    """The same in torch._foreach operations: each runs over all tensors before the next begins."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            states = [self._moments(p) for p in params]
            m, v = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
            beta1, beta2 = group["betas"]
            step = states[0]["step"]
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            denominator = torch._foreach_div(v, 1 - beta2**step)
            torch._foreach_sqrt_(denominator)
            torch._foreach_add_(denominator, group["eps"])
            u = torch._foreach_div(m, 1 - beta1**step)
            torch._foreach_div_(u, denominator)
            torch._foreach_add_(u, params, alpha=group["weight_decay"])
            norms_p, norms_u = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(u))
            ratios = torch.where((norms_p > 0) & (norms_u > 0), norms_p / norms_u, 1.0)
            torch._foreach_mul_(u, list((group["lr"] * ratios).unbind()))
            torch._foreach_sub_(params, u)
