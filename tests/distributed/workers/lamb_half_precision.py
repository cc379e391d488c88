"""What each gloo rank runs for test_lamb_zero.py: engines in fp16 and bf16."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.workers.lamb_engines import (
    BITS,
    LR,
    Bag,
    config,
    full_parameters,
    inject,
    make_engine,
    tiny_parameters,
)
from tests.lamb_checks import make_gradients, make_parameters
from train.build import start_engine
from train.config import Config
from train.config_sections.training import OptimizerConfig


def overflow() -> dict[str, Any]:
    """fp16 with loss scaling; at step 1 the gradient overflows in elements that rank 0 alone holds."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    settings = config("fp32", fp16={"enabled": True, "initial_scale_power": 4, "hysteresis": 1})
    engine, optimizer = make_engine(make_parameters(), settings)
    (flat,) = optimizer.param_groups[0]["params"]
    history = []
    for step in range(3):
        before = full_parameters(engine), optimizer.state[flat]["exp_avg"].clone()
        gradients = make_gradients(step, BITS["bf16"])
        if step == 1:
            gradients["embed.weight"][0, 0] = float("inf") if dist.get_rank() == 0 else 0.0
        inject(engine, gradients)
        after = full_parameters(engine), optimizer.state[flat]["exp_avg"]
        history.append(
            {
                "same": all(torch.equal(before[0][n], after[0][n]) for n in before[0])
                and torch.equal(before[1], after[1]),
                "finite": all(bool(torch.isfinite(p).all()) for p in after[0].values()),
                "skipped": engine.skipped_steps,
                "step": optimizer.state[flat]["step"],
                "scale": engine.optimizer.loss_scale,
            }
        )
    return {"history": history, "parameters": after[0]}


def accumulated_norms() -> dict[str, float]:
    """The gradient norm of eight fp16 micro steps, by the format they are added up in."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    fp16 = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}
    norms = {}
    for name, kept in {"fp32": {"grad_accum_dtype": "fp32"}, "fp16": {"grad_accum_dtype": "fp16"}}.items():
        engine, _ = make_engine(tiny_parameters(), config("fp32", 8, fp16=fp16, data_types=kept))
        for size in [1.0, *[2.0**-12] * 7]:
            engine.backward(engine({"w.weight": torch.full((1, 3), size)}))
            engine.step()
        norms[name] = float(engine.get_global_grad_norm())
    return norms


def first_masters() -> dict[str, dict[str, torch.Tensor]]:
    """The fp32 masters of engines in 16 bits before their first step, and the weights that they were made from."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    found = {"given": {name: p.detach().clone() for name, p in Bag(make_parameters()).named_parameters()}}
    for name, dtype, more in (("bf16", "bf16", {}), ("fp16", "fp32", {"fp16": {"enabled": True}})):
        recipe = Config(optimizer=OptimizerConfig(lr=LR))
        module: Any = Bag(make_parameters())
        found[name] = full_parameters(start_engine(recipe, module, config(dtype, **more), "cpu"))
        found[f"{name} weights"] = {each: p.detach().clone() for each, p in module.named_parameters()}
    return found
