"""What each gloo rank runs for test_lamb_zero.py: engines that are saved and resumed, AdamW's too."""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.workers.lamb_engines import (
    BITS,
    LR,
    Bag,
    clipped,
    config,
    deepspeed,
    full_parameters,
    inject,
    make_engine,
    train,
)
from tests.lamb_checks import make_gradients, make_parameters
from train.config_sections.training import OptimizerConfig
from train.optimizer import after_loading, bind_optimizer, build_optimizer, own_settings


def save_and_resume(folder: str) -> dict[str, Any]:
    """Six steps, a checkpoint after three; resumed at this world size; converted for the others."""
    engine, _ = make_engine(make_parameters(), config("fp32"))
    train(engine, range(3))
    engine.save_checkpoint(folder, tag="three")
    at_three = full_parameters(engine)
    train(engine, range(3, 6))
    straight = full_parameters(engine)

    engine, optimizer = make_engine(make_parameters(), config("fp32"))
    optimizer.param_groups[0]["lr"] = 123.0
    engine.load_checkpoint(folder, tag="three")
    train(engine, range(3, 6))
    resumed = full_parameters(engine)

    engine, optimizer = make_engine(make_parameters(), config("fp32"))
    engine.save_checkpoint(folder, tag="zero")  # before the first step: the state must be there already
    consolidated = converted(folder, "three")
    return {"at_three": at_three, "straight": straight, "resumed": resumed, "consolidated": consolidated}


def converted(folder: str, tag: str) -> dict[str, torch.Tensor]:
    """A checkpoint's weights as DeepSpeed consolidates them; a universal checkpoint is left beside it."""
    dist.barrier()
    if dist.get_rank() == 0:
        with contextlib.redirect_stdout(io.StringIO()):
            convert_to_universal(folder, tag)
    dist.barrier()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return dict(get_fp32_state_dict_from_zero_checkpoint(folder, tag=tag))


def convert_to_universal(folder: str, tag: str) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    main(
        argparse.Namespace(
            input_folder=str(Path(folder, tag)),
            output_folder=str(Path(folder, f"{tag}_universal")),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def adamw_engine(settings: dict[str, Any]) -> tuple[Any, torch.optim.Optimizer]:
    model = Bag(make_parameters())
    optimizer = build_optimizer(
        OptimizerConfig(name="adamw", lr=LR, weight_decay=0.1), model.named_parameters()
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    bind_optimizer(optimizer, engine)
    return engine, optimizer


def plain_adamw(
    start: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    """One process, whole tensors, torch's loop over them; what is decayed is written out by hand."""
    whole = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    decayed = {"embed.weight", "zero.weight", "layer.weight", "tiny.weight", "out.weight"}
    groups = [
        {"params": [whole[name] for name in whole if name in decayed], "weight_decay": 0.1},
        {"params": [whole[name] for name in whole if name not in decayed], "weight_decay": 0.0},
    ]
    return whole, torch.optim.AdamW(groups, lr=LR, eps=1e-6, fused=False, foreach=False)


def adamw(folder: str) -> dict[str, Any]:
    """Six steps beside torch's AdamW, under several engines; a checkpoint after three, resumed, and converted."""
    worst = {}
    for name, settings in (
        ("plain", config("fp32")),
        ("clipping", config("fp32", gradient_clipping=0.01)),
        ("bf16", config("bf16")),
        ("stage 1", config("fp32", zero={"stage": 1})),
    ):
        engine, _ = adamw_engine(settings)
        whole, plain = plain_adamw(full_parameters(engine))
        for step in range(6):
            gradients = make_gradients(step, BITS["bf16" if name == "bf16" else "fp32"])
            inject(engine, gradients)
            for key, gradient in clipped(gradients, engine).items():
                whole[key].grad = gradient
            plain.step()
            if (step, name) == (2, "plain"):
                engine.save_checkpoint(folder, tag="adamw")
        found = full_parameters(engine)
        worst[name] = max(float((found[key] - whole[key]).abs().max()) for key in whole)
        if name == "plain":
            straight = found
    engine, _ = adamw_engine(config("fp32"))
    engine.load_checkpoint(folder, tag="adamw")
    train(engine, range(3, 6))
    resumed = full_parameters(engine)
    shapes = {name: weight.shape for name, weight in converted(folder, "adamw").items()}
    return {"worst": worst, "straight": straight, "resumed": resumed, "shapes": shapes}


def adamw_universal(folder: str) -> dict[str, torch.Tensor]:
    engine, optimizer = adamw_engine(config("fp32", checkpoint={"load_universal": True}))
    own = own_settings(optimizer)
    engine.load_checkpoint(folder, tag="adamw_universal")
    after_loading(optimizer, own)
    train(engine, range(3, 6))
    return full_parameters(engine)


def resume_universal(folder: str) -> dict[str, dict[str, torch.Tensor]]:
    return {"lamb": lamb_universal(folder), "adamw": adamw_universal(folder)}


def lamb_universal(folder: str) -> dict[str, torch.Tensor]:
    settings = config("fp32", checkpoint={"load_universal": True})
    engine, optimizer = make_engine(make_parameters(), settings)
    engine.load_checkpoint(folder, tag="three_universal")
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 3
    train(engine, range(3, 6))
    return full_parameters(engine)
