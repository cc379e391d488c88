"""What the unit and the distributed tests of Lamb share: a small odd-shaped model, and the bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from train.lamb.parameters import is_bias_or_norm
from train.lamb.reference import ReferenceLamb
from train.lamb.update import coefficients

THIRD_STEP = coefficients(
    lr=0.1, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, step=3, bias_correction=True, mode="decoupled"
)

U = 2.0**-24
"""Unit roundoff of fp32: the largest relative error of one rounding."""
SECOND_ORDER = 1 + 1e-4
"""The bounds are of first order in U; products of two of the errors, each some 30 U, are below this."""

# Roundings on the longest way, counted as in BoundedReference, for a first step: m has 4, v 4 and so its root 2 + 2,
# the denominator 3 more, the quotient 1, u with its decay 1; a ratio 1 more; its factor 2, the product with u 1, p 1.
U_ROUNDINGS = 4 + 4 + 3 + 1 + 1
RATIO_ROUNDINGS = U_ROUNDINGS + 1
STEP_ROUNDINGS = RATIO_ROUNDINGS + U_ROUNDINGS + 2 + 1 + 1

SHAPES = {
    "embed.weight": (37, 29),
    "zero.weight": (6, 5),
    "layer.weight": (61, 23),
    "layer.bias": (23,),
    "zero.bias": (7,),
    "sa_layer_norm.weight": (31,),
    "sa_layer_norm.bias": (31,),
    "tiny.weight": (1, 1),
    "out.weight": (13, 3),
}


def make_parameters() -> dict[str, torch.nn.Parameter]:
    """The same numbers in every process: weights of several sizes, two tensors of zeros."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.nn.Parameter(
            torch.randn(shape, generator=generator) * (0.0 if name.startswith("zero") else 0.02 * (index + 1))
        )
        for index, (name, shape) in enumerate(SHAPES.items())
    }


def make_gradients(step: int, bits: int = 24) -> dict[str, torch.Tensor]:
    """Gradients of one step, of very different size per tensor; `tiny.weight` has none for two steps.

    Args:
        bits: significant bits kept, so that sums and means over ranks and accumulation steps stay exact.
    """
    generator = torch.Generator().manual_seed(100 + step)
    gradients = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        size = 0.0 if name == "tiny.weight" and step < 2 else 10.0 ** -(index % 5)
        mantissa, exponent = torch.frexp(torch.randn(shape, generator=generator) * size)
        gradients[name] = torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)
    return gradients


class BoundedReference(ReferenceLamb):
    """ReferenceLamb with a bound on how far fp32 arithmetic may be from it, on any processor and in any kernel.

    A running error analysis to first order in U: each operation adds U times its result to the errors of its
    operands. Counted are the roundings of an evaluation without fused multiply-adds (with them some fall away), one
    for each scalar, which is rounded to fp32, and two for a root (MKL's is within an ulp, not correctly rounded). The
    numbers must be large enough that nothing underflows.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._m_error = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self._v_error = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def step_from(
        self, old: Mapping[str, torch.Tensor], gradients: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """A step from the parameters `old`, which are exact; moments are carried on with their errors.

        Returns:
            The bound of each element of the new parameters, and that of each trust ratio.
        """
        for name, parameter in old.items():
            self.parameters[name].copy_(parameter.detach())
        moments = {name: (self.exp_avg[name].clone(), self.exp_avg_sq[name].clone()) for name in old}
        self.step(gradients)
        bounds = {
            name: self._bounds(name, old[name].detach().double(), *moments[name], gradients[name])
            for name in old
        }
        return {name: bound for name, (bound, _) in bounds.items()}, {n: r for n, (_, r) in bounds.items()}

    def _bounds(
        self, name: str, p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        plain = is_bias_or_norm(name, p.ndim) and self.mode != "deepspeed"
        c = coefficients(
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=0.0 if plain else self.weight_decay,
            step=self.step_count,
            bias_correction=self.bias_correction,
            mode=self.mode,
        )
        w1, w2 = 1 - c.beta1, 1 - c.beta2
        g = gradient.double() / self.grad_norm
        g_error = (
            2 * U * g.abs() if self.prenormalize else torch.zeros_like(g)
        )  # the norm's rounding, the division's
        # m + w1 (g - m): scalar, difference and product, then the sum. lerp's other form, for w1 above 1/2, has less.
        new_m, new_v = self.exp_avg[name], self.exp_avg_sq[name]
        m_error = c.beta1 * self._m_error[name] + w1 * g_error + 3 * U * w1 * (g - m).abs() + U * new_m.abs()
        # b2 v + w2 g g: scalar and product; scalar and two products; the sum.
        v_error = c.beta2 * self._v_error[name] + 2 * w2 * g.abs() * g_error
        v_error = v_error + 2 * U * c.beta2 * v + 3 * U * w2 * g * g + U * new_v
        root = new_v.sqrt()
        root_error = torch.where(root > 0, v_error / (2 * root), 0.0) + 2 * U * root
        # stretch root + shift: scalar and product; scalar; the sum.
        d = c.stretch * root + c.shift
        d_error = c.stretch * root_error + 2 * U * c.stretch * root + U * c.shift + U * d
        # m / d + decay p: the quotient; scalar and product; the sum.
        u = new_m / d + c.weight_decay * p
        u_error = m_error / d + (new_m / d).abs() * (d_error / d + U)
        u_error = u_error + 2 * U * c.weight_decay * p.abs() + U * u.abs()
        # The sums of squares are fp64, so that a ratio has its updates' errors and one rounding.
        adapted = self.trust_ratios[name] != 1
        ratio_error = float(u_error.norm() / u.norm()) + U if adapted else 0.0
        # p - (step_size ratio) u: scalar, two products; the sum.
        factor = c.step_size * self.trust_ratios[name]
        p_error = factor * (u_error + u.abs() * (ratio_error + 3 * U)) + U * self.parameters[name].abs()
        self._m_error[name], self._v_error[name] = m_error, v_error
        return p_error * SECOND_ORDER, self.trust_ratios[name] * ratio_error * SECOND_ORDER


def worst_error(
    parameters: Mapping[str, torch.Tensor], reference: ReferenceLamb, bounds: Mapping[str, torch.Tensor]
) -> float:
    """The largest difference from the reference, as a share of its bound; NaN where a parameter is."""
    shares = []
    for name, parameter in parameters.items():
        difference = (parameter.detach().cpu().double() - reference.parameters[name]).abs()
        shares.append(torch.where(difference == 0, 0.0, difference / bounds[name]).max())
    return float(torch.stack(shares).max())
