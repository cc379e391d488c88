"""What Lamb refuses, and that a refused step counts for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from train.lamb import Lamb


@pytest.mark.parametrize("fused", [False, None], ids=["eager", "default"])
def test_refuses_a_state_or_gradient_that_does_not_fit_and_counts_no_step(fused: bool | None) -> None:
    small, large = (torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 4), (40, 30)))
    saved = Lamb([("small", small), ("large", large)], lr=0.1, fused=fused)
    small.grad, large.grad = torch.ones_like(small), torch.ones_like(large)
    saved.step()
    before = small.detach().clone(), large.detach().clone()

    swapped = Lamb([("large", large), ("small", small)], lr=0.1, fused=fused)
    swapped.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg of large has shape \(4, 4\) and the parameter \(40, 30\)"):
        swapped.step()
    assert [swapped.state[p]["step"] for p in (small, large)] == [1, 1]

    moments = saved.state[large]["exp_avg_sq"]
    saved.state[large]["exp_avg_sq"] = moments[:1]
    with pytest.raises(ValueError, match=r"exp_avg_sq of large has shape \(1, 30\)"):
        saved.step()
    del saved.state[large]["exp_avg_sq"]
    with pytest.raises(ValueError, match="the state of large has no exp_avg_sq"):
        saved.step()
    saved.state[large]["exp_avg_sq"] = moments

    large.grad = None
    large.grad_dtype = torch.bfloat16
    large.grad = torch.ones(40, 30, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"gradient of large is torch.bfloat16 .* grad_dtype unset"):
        saved.step()
    assert [saved.state[p]["step"] for p in (small, large)] == [1, 1]
    assert torch.equal(small.detach(), before[0])
    assert torch.equal(large.detach(), before[1])


def test_a_refused_kernel_counts_no_step() -> None:
    """fused=True where there is no kernel for the dtype."""
    weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    weight.grad = torch.ones_like(weight)
    optimizer = Lamb([("weight", weight)], lr=0.1, fused=True)
    with pytest.raises(ValueError, match=r"no fused LAMB for torch\.float64"):
        optimizer.step()
    assert optimizer.state[weight].get("step", 0) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"betas": (0.9, 1.0)}, "betas are (0.9, 1.0)"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"eps": float("inf")}, "eps is inf"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"weight_decay": float("inf")}, "weight_decay is inf"),
        ({"clamp": (1.0, 0.5)}, "clamp is (1.0, 0.5)"),
        ({"mode": "apex"}, "mode is 'apex': choose 'decoupled' or 'deepspeed'"),
        ({"mode": "deepspeed", "prenormalize": True}, "prenormalize has no place"),
        ({"mode": "deepspeed", "adapt_all": True}, "adapt_all would change nothing"),
    ],
)
def test_refuses_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError) as caught:
        Lamb([("weight", weight)], **{"lr": 0.1, **arguments})
    assert message in str(caught.value)


def test_refuses_what_it_cannot_update() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"pass model.named_parameters\(\), not model.parameters\(\)"):
        Lamb([weight], lr=0.1)
    with pytest.raises(ValueError, match="no trainable parameter"):
        Lamb([("weight", weight.detach())], lr=0.1)
    with pytest.raises(ValueError, match="two different parameters are named 'w'"):
        Lamb([("w", weight), ("w", torch.nn.Parameter(torch.ones(2)))], lr=0.1)
    half = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    half.grad = torch.ones(2, 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="keep fp32 master weights"):
        Lamb([("w", half)], lr=0.1).step()
    lazy = torch.nn.Parameter(torch._neg_view(torch.ones(2, 2)))
    lazy.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="w is a lazy negation"):
        Lamb([("w", lazy)], lr=0.1).step()
    weight.grad = torch._efficientzerotensor(2, 2)
    with pytest.raises(ValueError, match=r"the gradient w .* has no memory of its own"):
        Lamb([("w", weight)], lr=0.1).step()
    twin = torch.nn.Parameter(torch.ones(2, 2))
    twin.data = weight.data
    with pytest.raises(ValueError, match="w and twin are two parameters that share their memory"):
        Lamb([("w", weight), ("twin", twin)], lr=0.1)
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense gradients"):
        Lamb(table.named_parameters(), lr=0.1).step()
    optimizer = Lamb([("weight", weight)], lr=0.1)
    with pytest.raises(ValueError, match="one parameter group"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


def test_refuses_replaced_parameters_while_unbound() -> None:
    """Also where the flat partition happens to have the shape of the only tensor."""
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = Lamb([("weight", weight)], lr=0.1)
    flat = torch.ones(4, requires_grad=True)
    flat.grad = torch.ones(4)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match=r"call optimizer.bind\(engine\) after deepspeed.initialize"):
        optimizer.step()
    optimizer = Lamb([("a", weight), ("b", torch.nn.Parameter(torch.ones(2)))], lr=0.1)
    optimizer.param_groups[0]["params"] = [flat, torch.ones(2, requires_grad=True)]
    with pytest.raises(ValueError, match="copies of its parameters: DeepSpeed's stage 0 does so"):
        optimizer.step()
