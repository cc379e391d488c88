"""Small engines for the workers of test_lamb_zero.py, and gradients of exact means for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param

from tests.lamb_checks import U, make_gradients
from train.distributed.world import import_deepspeed
from train.lamb import Lamb

deepspeed = import_deepspeed()

LR = 0.01
STEPS = 4
# Significant bits of the injected gradients: few enough that means over three ranks, and bf16, are exact.
BITS = {"fp32": 18, "bf16": 5}


class Bag(torch.nn.Module):
    """Parameters under the names of lamb_checks.SHAPES; the loss below gives them the wanted gradients."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            owner, _, leaf = name.rpartition(".")
            if not hasattr(self, owner):
                setattr(self, owner, torch.nn.Module())
            getattr(self, owner).register_parameter(leaf, parameter)

    def forward(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((p.float() * gradients[name]).sum() for name, p in self.named_parameters())  # type: ignore


def tiny_parameters() -> dict[str, torch.nn.Parameter]:
    """Three elements: from three ranks on, the last ones hold nothing but padding."""
    return {"w.weight": torch.nn.Parameter(torch.tensor([[1.0, -2.0, 0.5]]))}


def config(
    dtype: str, accumulation: int = 1, zero: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    base: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": 2, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed's own default is 1.0
    }
    if dtype == "bf16":
        base["bf16"] = {"enabled": True}
        base["data_types"] = {"grad_accum_dtype": "fp32"}
    return {**base, **more}


def make_engine(
    parameters: dict[str, torch.nn.Parameter], settings: dict[str, Any], lamb: Any = Lamb, **options: Any
) -> tuple[Any, Any]:
    model = Bag(parameters)
    named = model.named_parameters() if lamb is Lamb else model.parameters()
    optimizer = lamb(named, lr=LR, **options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if lamb is Lamb:
        optimizer.bind(engine)
    return engine, optimizer


def inject(engine: Any, gradients: dict[str, torch.Tensor], scale: float = 1.0) -> None:
    """Give the engine mean gradients of exactly `gradients` over all ranks and accumulation steps.

    Element i comes from rank i mod W alone, in one micro step alone, times W and the number of micro steps.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    accumulation = engine.gradient_accumulation_steps()
    for micro_step in range(accumulation):
        mine = {}
        for name, gradient in gradients.items():
            index = torch.arange(gradient.numel()).view(gradient.shape)
            chosen = (index % world_size == rank) & (index // world_size % accumulation == micro_step)
            mine[name] = gradient * chosen * (world_size * accumulation * scale)
        engine.backward(engine(mine))
        engine.step()


def full_parameters(engine: Any) -> dict[str, torch.Tensor]:
    named = engine.module.named_parameters()
    if engine.zero_optimization_stage() == 0:
        return {name: p.detach().clone() for name, p in named}
    return {name: safe_get_full_fp32_param(p).clone() for name, p in named}


def clipped(gradients: dict[str, torch.Tensor], engine: Any) -> dict[str, torch.Tensor]:
    """As DeepSpeed clips (stage_1_and_2.py, unscale_and_clip_grads), from the norm that it reports."""
    limit = engine.gradient_clipping()
    if not limit:
        return gradients
    norm = torch.as_tensor(engine.get_global_grad_norm())
    true_norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
    elements = sum(g.numel() for g in gradients.values())
    assert abs(float(norm) / true_norm - 1) <= elements * U  # an fp32 sum of their squares, in any order
    clip = torch.clamp((norm + 1e-6) / limit, min=1.0)
    assert clip > 1, "the scenario must clip"
    return {name: g * (1.0 / clip) for name, g in gradients.items()}


def train(engine: Any, steps: range) -> None:
    for step in steps:
        inject(engine, make_gradients(step, BITS["fp32"]))
