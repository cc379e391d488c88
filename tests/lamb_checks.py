"""What the unit and the distributed tests of Lamb share: a small odd-shaped model and the 4-ulp measure."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from train.lamb.reference import ReferenceLamb
from train.lamb.update import coefficients

THIRD_STEP = coefficients(
    lr=0.1, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, step=3, bias_correction=True, mode="decoupled"
)

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


def ulp(x: torch.Tensor) -> torch.Tensor:
    """Distance between neighbouring fp32 numbers at |x|."""
    x = x.abs().float()
    return torch.nextafter(x, torch.tensor(torch.inf)) - x


def worst_ulp(
    parameters: Mapping[str, torch.Tensor], reference: ReferenceLamb, old: Mapping[str, torch.Tensor]
) -> float:
    """Largest difference from the reference, in ulp at the larger of the old parameter and its update."""
    worst = 0.0
    for name, parameter in parameters.items():
        difference = (parameter.detach() - reference.parameters[name]).abs()
        unit = ulp(torch.maximum(old[name].detach().abs(), reference.updates[name].abs().float()))
        worst = max(worst, float((difference / unit).max()))
    return worst
