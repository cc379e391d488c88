"""Which tensors take decay and adaptation, and where tensors lie in a partition."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.models.test_families import MODELS
from train.lamb import Lamb
from train.lamb.parameters import is_bias_or_norm
from train.lamb.zero_layout import Fragment, partition_fragments, read_layout


@pytest.mark.parametrize("family", MODELS)
def test_names_and_shapes_agree_for_every_family(family: str) -> None:
    """The two criteria, each alone, single out the same tensors: biases and the weights of norm layers."""
    model = MODELS[family]()
    plain = {n for n, p in model.named_parameters() if is_bias_or_norm(n, ndim=2)}
    assert plain == {n for n, p in model.named_parameters() if is_bias_or_norm("x", p.ndim)}
    norms = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for leaf, _ in module.named_parameters(recurse=False)
    }
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    assert plain == norms | biases
    optimizer = Lamb(model.named_parameters(), lr=0.1)
    adapted = {n for n, a in zip(optimizer.tensor_names, optimizer.adapted.tolist(), strict=True) if a}
    assert adapted == set(optimizer.tensor_names) - plain


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert"])
def test_tied_weights_count_once(family: str) -> None:
    model = MODELS[family]()
    optimizer = Lamb(model.named_parameters(remove_duplicate=False), lr=0.1)
    assert len({id(p) for p in optimizer.param_groups[0]["params"]}) == len(optimizer.tensor_names)
    assert len(list(model.named_parameters(remove_duplicate=False))) > len(optimizer.tensor_names)


@pytest.mark.parametrize(
    "name",
    ["h.0.ln_1.weight", "ln_f.weight", "encoder.norm1.weight", "a.RMSNorm.scale", "input_layernorm.weight"],
)
def test_other_families_norms(name: str) -> None:
    assert is_bias_or_norm(name, ndim=2)


@pytest.mark.parametrize(
    "name", ["normalizer.weight", "norm_proj.weight", "enormous.weight", "lnear.weight", "w"]
)
def test_not_every_name_with_norm_in_it(name: str) -> None:
    assert not is_bias_or_norm(name, ndim=2)


def test_frozen_parameters_are_left_out() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert Lamb(model.named_parameters(), lr=0.1).tensor_names == ("1.weight", "1.bias")


def test_refuses_fsdps_flat_parameters() -> None:
    """They hold shards of many tensors under one name: a trust ratio of such a thing means nothing."""
    flat = torch.nn.Parameter(torch.ones(6))
    with pytest.raises(ValueError, match=r"_flat_param is FSDP's.* DeepSpeed's ZeRO stage 1 or 2"):
        Lamb([("_fsdp_wrapped_module._flat_param", flat)], lr=0.1)


def test_partition_fragments() -> None:
    """Tensors of 5, 3 and 9 elements at 0, 8 (3 of padding before) and 11; partitions of 7."""
    geometry = ((4, 0, 2), (0, 8, 11), (5, 3, 9))
    assert partition_fragments(*geometry, 0, 7) == (Fragment(4, 0, 5),)
    assert partition_fragments(*geometry, 7, 7) == (Fragment(0, 1, 4), Fragment(2, 4, 7))
    assert partition_fragments(*geometry, 14, 7) == (Fragment(2, 0, 6),)
    assert partition_fragments(*geometry, 21, 7) == ()


def test_a_bound_optimizer_chooses_no_kernel_of_its_own_later() -> None:
    """Ranks that chose again, each for itself, could part ways."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([("weight", weight)], lr=0.1)
    optimizer.bind(SimpleNamespace(optimizer=optimizer))
    assert optimizer.kernel in {"native", "eager"}
    weight.data = weight.data.double()
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match=r"float64 on cpu: call bind\(engine\) again, on every rank"):
        optimizer.step()
    assert optimizer.state[weight]["step"] == 0


def _zero(optimizer: Lamb, parameter: torch.Tensor, **settings: Any) -> Any:
    """What bind reads of DeepSpeed's ZeRO-1/2 wrapper."""
    wrapper = SimpleNamespace(
        optimizer=optimizer,
        round_robin_bit16_offsets=[[0]],
        bit16_groups=[[parameter]],
        round_robin_bit16_groups=[[parameter]],
        **settings,
    )
    return SimpleNamespace(optimizer=wrapper)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"has_moe_layers": True},
            r"has_moe_layers, which splits experts .* \(MoE\): train without MoE layers",
        ),
        ({"zenflow": True}, "remove zero_optimization.zenflow"),
        ({"torch_autocast_gradscaler": object()}, "torch_autocast"),
    ],
)
def test_refuses_what_the_distributed_tests_cannot_set_up(settings: dict[str, Any], message: str) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([("weight", weight)], lr=0.1)
    with pytest.raises(ValueError, match=message):
        read_layout(_zero(optimizer, weight, **settings), optimizer, [weight])


def test_refuses_parameters_it_was_not_given_and_unknown_wrappers() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([("weight", weight)], lr=0.1)
    other = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="bind got Linear: it takes the engine"):
        optimizer.bind(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="tensor parallelism over 2 ranks"):
        read_layout(SimpleNamespace(optimizer=optimizer, mp_world_size=2), optimizer, [weight])
    engine = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    with pytest.raises(ValueError, match="SimpleNamespace, whose layout Lamb does not know"):
        read_layout(engine, optimizer, [weight])
    optimizer.param_groups[0]["params"] = [weight, other]
    with pytest.raises(
        ValueError, match=r"trains 1 tensors that Lamb was not given \(the first has shape \(3,\)\)"
    ):
        read_layout(SimpleNamespace(optimizer=optimizer), optimizer, [weight])
