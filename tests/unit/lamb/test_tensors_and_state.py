"""Lamb without an engine: tensors of every layout and dtype, and its state, which is saved, copied and taken over."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from tests.lamb_checks import (
    RATIO_ROUNDINGS,
    SHAPES,
    U,
    make_gradients,
    make_parameters,
)
from train.lamb import Lamb


@pytest.mark.parametrize("fused", [False, None], ids=["eager", "default"])
def test_parameters_without_gradients_are_left_alone(fused: bool | None) -> None:
    """The ratios of the others stay at their own places."""
    parameters = [torch.nn.Parameter(torch.full((2, 2), size)) for size in (1.0, 2.0, 3.0)]
    optimizer = Lamb(zip("abc", parameters, strict=True), lr=0.1, weight_decay=0.0, fused=fused)
    for parameter in (parameters[0], parameters[2]):
        parameter.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(parameters[1].detach(), torch.full((2, 2), 2.0))
    assert optimizer.state[parameters[1]] == {}
    assert optimizer.trust_ratios.tolist() == pytest.approx(
        [1 + 1e-6, 1, 3 * (1 + 1e-6)], rel=RATIO_ROUNDINGS * U
    )  # u = 1 / (1 + eps)


@pytest.mark.parametrize("fused", [False, None], ids=["eager", "default"])
def test_a_lazily_negated_gradient_keeps_its_sign(fused: bool | None) -> None:
    outcomes = []
    for lazy in (False, True):
        weight = torch.nn.Parameter(torch.ones(2, 2))
        gradient = torch.full((2, 2), 0.5)
        weight.grad = torch._neg_view(gradient) if lazy else -gradient
        Lamb([("weight", weight)], lr=0.1, fused=fused).step()
        outcomes.append(weight.detach())
    assert torch.equal(*outcomes)


def test_strided_parameters_and_gradients() -> None:
    """A transposed parameter gets the update that its contiguous twin gets."""
    base = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    straight, strided = torch.nn.Parameter(base.clone()), torch.nn.Parameter(base.t().contiguous().t())
    assert not strided.is_contiguous()
    for parameter in (straight, strided):
        optimizer = Lamb([("weight", parameter)], lr=0.1)
        for _ in range(3):
            parameter.grad = base.square()
            optimizer.step()
    assert torch.equal(straight.detach(), strided.detach())


@pytest.mark.parametrize("fused", [False, None], ids=["eager", "default"])
def test_strided_vectors(fused: bool | None) -> None:
    """One-dimensional views with a stride, which flatten to themselves: every second element, one repeated."""
    plain = torch.nn.Parameter(torch.arange(1.0, 40))
    strided = torch.nn.Parameter(torch.arange(1.0, 40).repeat_interleave(2)[::2])
    assert strided.stride() == (2,)
    plain.grad, strided.grad = torch.full((39,), 0.5), torch.tensor(0.5).expand(39)
    for parameter in (plain, strided):
        Lamb([("weight", parameter)], lr=0.1, adapt_all=True, fused=fused).step()
    assert torch.equal(plain.detach(), strided.detach())


@pytest.mark.parametrize("fused", [False, None], ids=["eager", "default"])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_moments_follow_a_model_whose_dtype_changed(
    dtypes: tuple[torch.dtype, torch.dtype], fused: bool | None
) -> None:
    """They count as if they had been loaded after the change; a mixture is refused."""
    outcomes = []
    for reload in (True, False):
        module = torch.nn.Linear(64, 32).to(dtypes[0])
        torch.nn.init.constant_(module.weight, 0.01)
        torch.nn.init.constant_(module.bias, 0.01)
        optimizer = Lamb(module.named_parameters(), lr=0.1, fused=fused)
        for dtype in dtypes:
            module.to(dtype)
            if reload:
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.zero_grad()
            module(torch.ones(1, 64, dtype=dtype)).square().sum().backward()
            optimizer.step()
        assert optimizer.state[module.weight]["exp_avg"].dtype == dtypes[1]
        outcomes.append(module.weight.detach())
    assert torch.isfinite(outcomes[0]).all()
    assert torch.equal(*outcomes)
    module.weight.data, module.weight.grad = (
        module.weight.data.to(dtypes[0]),
        torch.ones(32, 64, dtype=dtypes[0]),
    )
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"one dtype, and got torch\.float32 on cpu, torch\.float64 on cpu"):
        optimizer.step()


@pytest.mark.parametrize("fused", [False, None], ids=["eager", "default"])
def test_strided_moments_of_another_optimizer(fused: bool | None) -> None:
    """AdamW keeps the same state under the same names, its step as a tensor; its moments have the parameter's strides,
    and must meet the right elements."""
    base = torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(0))
    outcomes = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = torch.nn.Parameter(base.clone(memory_format=layout))
        adamw = torch.optim.AdamW([weight], lr=0.1)
        weight.grad = base.square()
        adamw.step()
        optimizer = Lamb([("weight", weight)], lr=torch.tensor(0.1), fused=fused)
        optimizer.load_state_dict(adamw.state_dict())
        optimizer.step()
        assert (optimizer.state[weight]["step"], type(optimizer.state[weight]["step"])) == (2, int)
        outcomes.append(weight.detach())
    assert torch.isfinite(outcomes[0]).all()
    assert torch.equal(*outcomes)


@pytest.mark.parametrize("fused", [False, None], ids=["eager", "default"])
def test_autograd_notices_the_update(fused: bool | None) -> None:
    """A backward pass through the weights as they were must fail, not use those of after the step."""
    weight = torch.nn.Parameter(torch.ones(3, 3))
    x = torch.ones(3, 3, requires_grad=True)
    optimizer = Lamb([("weight", weight)], lr=0.1, fused=fused)
    weight.grad = torch.ones(3, 3)
    optimizer.step()
    moments = [optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq")]
    versions = [moment._version for moment in moments]
    loss = (weight @ x).sum()
    optimizer.step()
    assert all(m._version > version for m, version in zip(moments, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_state_dict_round_trip_continues_bit_for_bit() -> None:
    def run(steps: range, optimizer: Lamb, parameters: dict[str, torch.nn.Parameter]) -> None:
        for step in steps:
            for name, gradient in make_gradients(step).items():
                parameters[name].grad = gradient
            optimizer.step()

    straight = make_parameters()
    run(range(6), Lamb(straight.items(), lr=0.01), straight)
    first = make_parameters()
    optimizer = Lamb(first.items(), lr=0.01)
    run(range(3), optimizer, first)
    saved = copy.deepcopy(optimizer.state_dict())
    second = {name: torch.nn.Parameter(p.detach().clone()) for name, p in first.items()}
    resumed = Lamb(second.items(), lr=0.5)
    resumed.load_state_dict(saved)
    run(range(3, 6), resumed, second)
    for name in SHAPES:
        assert torch.equal(straight[name].detach(), second[name].detach()), name
    assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(saved["param_groups"][0]) >= {"lr", "betas", "eps", "weight_decay", "params"}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_copies_step_alike(copied: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = Lamb([("weight", weight)], lr=0.1)
    weight.grad = torch.ones(2, 3)
    optimizer.step()
    twin = copied(optimizer)
    (twin_weight,) = twin.param_groups[0]["params"]
    weight.grad, twin_weight.grad = torch.ones(2, 3), torch.ones(2, 3)
    optimizer.step()
    twin.step()
    assert torch.equal(weight, twin_weight)
    assert twin_weight is not weight


def test_closure_and_learning_rate() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([("weight", weight)], lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.0

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 4.0
    assert torch.equal(weight.detach(), torch.ones(2, 2))
    scheduler = torch.optim.lr_scheduler.LambdaLR(Lamb([("weight", weight)], lr=0.1), lambda step: 0.5)
    assert scheduler.get_last_lr() == [0.05]
