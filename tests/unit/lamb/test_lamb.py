"""Lamb without an engine: against the reference, hand-worked values, torch and the published kernels' formulas."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.lamb_checks import (
    RATIO_ROUNDINGS,
    STEP_ROUNDINGS,
    THIRD_STEP,
    BoundedReference,
    U,
    make_gradients,
    make_parameters,
    worst_error,
)
from train.lamb import Lamb
from train.lamb import native as lamb_native
from train.lamb.optimizer import choose_kernel
from train.lamb.parameters import tensor_rules
from train.lamb.update import Buffers
from train.lamb.zero_layout import Fragment

OPTIONS: list[dict[str, Any]] = [
    {},
    {"adapt_all": True},
    {"clamp": (0.1, 0.5)},
    {"bias_correction": False},
    {"prenormalize": True},
    {"mode": "deepspeed"},
    {"weight_decay": 0.0, "betas": (0.5, 0.9), "eps": 1e-3},
]


def _name(options: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items()) or "defaults"


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "native"])
@pytest.mark.parametrize("options", OPTIONS, ids=_name)
def test_agrees_with_the_reference(options: dict[str, Any], fused: bool) -> None:
    if fused and lamb_native.build() is None:
        pytest.skip("no C compiler")
    parameters = make_parameters()
    optimizer = Lamb(parameters.items(), lr=0.01, fused=fused, **options)
    reference = BoundedReference(parameters, 0.01, **options)
    for step in range(5):
        gradients = make_gradients(step)
        bounds, ratio_bounds = reference.step_from(parameters, gradients)
        for name, p in parameters.items():
            p.grad = gradients[name].clone()
        optimizer.step()
        assert worst_error(parameters, reference, bounds) <= 1
        for name, ratio in zip(optimizer.tensor_names, optimizer.trust_ratios.tolist(), strict=True):
            assert abs(ratio - reference.trust_ratios[name]) <= ratio_bounds[name], name
        for name, p in parameters.items():
            assert torch.equal(p.grad, gradients[name]), "gradients must be left alone"


# The trust ratio is fp32 whatever the parameters are, and one rounding of it all that shows where they are fp64.
DTYPES = pytest.mark.parametrize(
    ("dtype", "ratio_error", "step_error"),
    [(torch.float64, U, U), (torch.float32, RATIO_ROUNDINGS * U, STEP_ROUNDINGS * U)],
    ids=["fp64", "fp32"],
)


@DTYPES
def test_hand_worked_first_step(dtype: torch.dtype, ratio_error: float, step_error: float) -> None:
    """p = (3, 4), g = (1, -2), lr 0.1, decay 0.1, eps 1: every number below is worked on paper.

    m = 0.1 g, v = 0.001 g^2; corrected they are g and g^2, so u = g / (|g| + 1) + 0.1 p
    = (0.5 + 0.3, -2/3 + 0.4) = (0.8, -4/15). ||p|| = 5, ||u|| = sqrt(0.64 + 16/225) = sqrt(32/45).
    """
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=dtype))
    weight.grad = torch.tensor([[1.0, -2.0]], dtype=dtype)
    optimizer = Lamb([("weight", weight)], lr=0.1, eps=1.0, weight_decay=0.1)
    optimizer.step()
    ratio = 5 / math.sqrt(32 / 45)
    # The terms of the second update have different signs: an error is as large as 2/3 + 0.4 allow, 4 times 4/15.
    assert optimizer.trust_ratios.item() == pytest.approx(ratio, rel=4 * ratio_error)
    expected = (3 - 0.1 * ratio * 0.8, 4 + 0.1 * ratio * 4 / 15)
    for value, wanted, size in zip(weight[0].tolist(), expected, (3 + 0.5, 4 + 0.7), strict=True):
        assert value == pytest.approx(wanted, rel=0, abs=size * step_error)


@DTYPES
def test_hand_worked_second_step_and_deepspeed_mode(
    dtype: torch.dtype, ratio_error: float, step_error: float
) -> None:
    """One element, p = 2, g = 1 then 1, lr 0.5, no decay, eps 0.25; two steps of each mode on paper.

    decoupled: m/c1 = 1, v/c2 = 1 in both steps, u = 1/1.25 = 0.8, ratio p/0.8, so p = p - 0.5 p: 1, then 0.5.
    deepspeed: step 1: m = 0.1, v = 0.001, u = 0.1 / (sqrt(0.001) + 0.25), ratio min(2/u, 10) = 2/u > 5.6, and
    p = 2 - 0.5 sqrt(0.001)/0.1 x 2 (ratio x u = p while the ratio is below 10).
    """
    weight = torch.nn.Parameter(torch.tensor([[2.0]], dtype=dtype))
    optimizer = Lamb([("weight", weight)], lr=0.5, eps=0.25, weight_decay=0.0)
    for step, expected in enumerate((1.0, 0.5), 1):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert weight.item() == pytest.approx(expected, rel=0, abs=step * 2 * step_error)

    weight = torch.nn.Parameter(torch.tensor([[2.0]], dtype=dtype))
    optimizer = Lamb([("weight", weight)], lr=0.5, eps=0.25, weight_decay=0.0, mode="deepspeed")
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    ratio = 2 / (0.1 / (math.sqrt(0.001) + 0.25))
    assert optimizer.trust_ratios.item() == pytest.approx(ratio, rel=ratio_error)
    expected = 2 - 0.5 * math.sqrt(0.001) / 0.1 * 2
    assert weight.item() == pytest.approx(expected, rel=0, abs=2.4 * step_error)


def test_deepspeed_mode_is_the_fused_lamb_kernel() -> None:
    """Against DeepSpeed's fused_lamb_cuda_kernel.cu, transcribed line by line; all in fp64 but the trust ratio."""
    lr, beta1, beta2, eps, decay, max_coeff, min_coeff = 0.02, 0.9, 0.999, 1e-8, 0.01, 10.0, 0.01
    parameters = {name: torch.nn.Parameter(p.detach().double()) for name, p in make_parameters().items()}
    optimizer = Lamb(parameters.items(), lr=lr, eps=eps, weight_decay=decay, mode="deepspeed")
    state = {n: [p.detach().clone(), 0 * p.detach(), 0 * p.detach()] for n, p in parameters.items()}
    moved = {name: 0 * p.detach() for name, p in parameters.items()}
    for step in range(1, 5):
        gradients = make_gradients(step)
        step_size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        for name, (p, m, v) in state.items():
            g = gradients[name].double()
            m.copy_(beta1 * m + (1 - beta1) * g)
            v.copy_(beta2 * v + (1 - beta2) * g * g)
            update = m / (v.sqrt() + eps) + decay * p
            w_norm, u_norm, coefficient = p.norm(), update.norm(), 1.0
            if w_norm != 0 and u_norm != 0:
                coefficient = min(max(float(w_norm / u_norm), min_coeff), max_coeff)
            p.sub_(step_size * coefficient * update)
            moved[name] += (step_size * coefficient * update).abs()
            parameters[name].grad = g
        optimizer.step()
        for name, (p, _, _) in state.items():
            # Every update so far has a ratio rounded to fp32: twice that, for its effect on the later ones.
            fp64 = step * STEP_ROUNDINGS * 2.0**-53 * (p.abs() + moved[name])
            assert ((parameters[name].detach() - p).abs() <= 2 * U * moved[name] + fp64).all(), name


def test_without_adaptation_it_is_torch_adam() -> None:
    """Biases and norms take plain Adam steps: no decay, ratio 1."""
    parameters = {n: p for n, p in make_parameters().items() if p.ndim == 1}
    twins = {name: torch.nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    optimizer = Lamb(parameters.items(), lr=0.01)
    reference = BoundedReference(parameters, 0.01)
    adam = torch.optim.Adam(twins.values(), lr=0.01, eps=1e-6)
    for step in range(5):
        gradients = {name: gradient for name, gradient in make_gradients(step).items() if name in parameters}
        bounds, _ = reference.step_from(parameters, gradients)
        for name in parameters:
            twins[name].data.copy_(parameters[name].detach())
            parameters[name].grad, twins[name].grad = gradients[name].clone(), gradients[name].clone()
        optimizer.step()
        adam.step()
        assert worst_error(parameters, reference, bounds) <= 1
        # Adam divides the root by that of its correction and adds eps: as many roundings as stretch and shift have.
        assert worst_error(twins, reference, bounds) <= 1
    assert optimizer.trust_ratios.tolist() == [1.0] * len(parameters)


@pytest.mark.parametrize("fused", [False, None], ids=["eager", "default"])
def test_elements_do_not_depend_on_where_they_lie(fused: bool | None) -> None:
    """A world size moves the cuts; an element's result, and with it the fp32 ratios, must not move.

    The C loops guarantee that: one IEEE operation after another wherever an element lies. Of torch's operations it is
    required here, since replicas of different cuts rely on it. Sums over other cuts differ by some 1e-16, which shows
    in a ratio's fp32 once in about 1e8 cases.
    """
    torch.manual_seed(0)
    n = 20_011
    start = [torch.randn(n) * 0.02, torch.randn(n), torch.randn(n), torch.rand(n)]
    rules = tensor_rules([("weight", start[0].view(1, n))], adapt_all=False, decay_all=False)
    outcomes = []
    for cuts in ([0, n], [0, 1, 2, 37, n], [0, 6_671, 13_339, n], [*range(0, n, 997), n]):
        kernel = choose_kernel(fused, (torch.device("cpu"), torch.float32))
        p, g, m, v = (x.clone() for x in start)
        sums = torch.zeros(1, 2, dtype=torch.float64)
        buffers = [Buffers(p, g, m, v, tuple(Fragment(0, a, b) for a, b in pairwise(cuts)), THIRD_STEP)]
        kernel.first_pass(buffers, rules, sums, None)
        kernel.second_pass(buffers, rules, torch.tensor([0.3]))
        outcomes.append((p, m, v, (sums[0, 0] / sums[0, 1]).sqrt().float()))
    for outcome in outcomes[1:]:
        for ours, whole in zip(outcome, outcomes[0], strict=True):
            assert torch.equal(ours, whole)


def test_zero_parameters_and_zero_gradients_have_ratio_one() -> None:
    """And without any gradient a global norm of 0 divides nothing."""
    zero = torch.nn.Parameter(torch.zeros(3, 4))
    still = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = Lamb([("zero.weight", zero), ("still.weight", still)], lr=0.1, weight_decay=0.0)
    zero.grad, still.grad = torch.ones(3, 4), torch.zeros(3, 4)
    optimizer.step()
    assert optimizer.trust_ratios.tolist() == [1.0, 1.0]
    # u = 1 / (1 + eps)
    torch.testing.assert_close(
        zero.detach(), torch.full((3, 4), -0.1 / (1 + 1e-6)), rtol=STEP_ROUNDINGS * U, atol=0
    )
    assert torch.equal(still.detach(), torch.ones(3, 4))
    optimizer = Lamb([("still.weight", still)], lr=0.1, weight_decay=0.0, prenormalize=True)
    optimizer.step()
    assert torch.equal(still.detach(), torch.ones(3, 4))


@pytest.mark.parametrize("fused", [False, None], ids=["eager", "default"])
def test_a_trust_ratio_beyond_fp32_leaves_updates_of_zero_at_zero(fused: bool | None) -> None:
    """One denormal gradient and no weight decay: ||p|| / ||u|| is 16 / 2e-38."""
    weight = torch.nn.Parameter(torch.ones(16, 16))
    optimizer = Lamb([("weight", weight)], lr=0.01, weight_decay=0.0, fused=fused)
    weight.grad = torch.zeros(16, 16)
    weight.grad[0, 0] = 2e-44
    optimizer.step()
    assert optimizer.trust_ratios.item() == torch.finfo(torch.float32).max
    assert 0 < weight[0, 0] < 1
    assert (weight.flatten()[1:] == 1).all()
