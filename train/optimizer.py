"""The optimizer that a recipe names, made from a model's parameters and bound to DeepSpeed's engine.

LAMB is this project's (train/lamb/). AdamW is torch's, fused. ZeRO hands it one flat fp32 partition for each of its
groups, which changes nothing for an update that works element by element; the state is made at once, since the engine
links that of its first group alone, and only after the first step, to what its checkpoints hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from train.config_sections.training import OptimizerConfig
from train.errors import UserError
from train.lamb import Lamb, is_bias_or_norm, refused_setting


def build_optimizer(
    settings: OptimizerConfig, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
) -> torch.optim.Optimizer:
    """The optimizer of the trainable parameters; biases and normalisation parameters take no decay.

    Args:
        named_parameters: as from `model.named_parameters()`, each tensor once.
    Raises:
        UserError: what Lamb refuses of its options.
    """
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    common: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "adamw":
        return torch.optim.AdamW(decay_groups(named), **common, fused=True)
    try:
        return Lamb(
            named,
            **common,
            adapt_all=settings.adapt_all,
            clamp=settings.clamp,
            prenormalize=settings.prenormalize,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def decay_groups(named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> list[dict[str, Any]]:
    """torch's parameter groups: what is decayed, and what is not (LAMB's rule); an empty one is left out."""
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in named_parameters:
        (plain if is_bias_or_norm(name, parameter.ndim) else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def bind_optimizer(optimizer: torch.optim.Optimizer, engine: Any) -> None:
    """Make the optimizer ready for the partitions that the engine gives it; once, after deepspeed.initialize.

    Raises:
        UserError: the engine is set up in a way that the optimizer is not right, or not tested, under.
    """
    if isinstance(optimizer, Lamb):
        try:
            return optimizer.bind(engine)
        except ValueError as error:
            raise UserError(str(error)) from error
    zero = engine.optimizer
    if getattr(zero, "optimizer", None) is not optimizer or not hasattr(zero, "round_robin_bit16_offsets"):
        raise UserError(
            f"the engine wraps its optimizer in {type(zero).__name__}, which AdamW is not tested under: use "
            "zero_optimization.stage 2 (or stage 1 without fp32 accumulation of bf16 gradients)"
        )
    if (refused := refused_setting(zero)) is not None:
        raise UserError(f"AdamW is not tested with {refused}")
    for group in optimizer.param_groups:
        for partition in group["params"]:
            if partition.dtype != torch.float32:
                raise UserError(
                    f"the engine's partition is {partition.dtype} where fp32 is expected: keep fp32 master weights (no "
                    "fp16/bf16_master_weights_and_grads)"
                )
            optimizer.state[partition] = {
                "step": torch.zeros((), device=partition.device),
                "exp_avg": torch.zeros_like(partition),
                "exp_avg_sq": torch.zeros_like(partition),
            }
    return None


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """What optimizer.name calls it."""
    return "lamb" if isinstance(optimizer, Lamb) else "adamw"


def own_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of each group, without its parameters: what a checkpoint must not overwrite."""
    return [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]


def after_loading(optimizer: torch.optim.Optimizer, settings: list[dict[str, Any]]) -> None:
    """Put back the recipe's settings, which a checkpoint overwrites with its own, and bring the step counts that a
    universal checkpoint leaves on the CPU to where torch's fused AdamW wants them.

    Args:
        settings: from `own_settings`, before the checkpoint was loaded.
    """
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
        for partition in group["params"]:
            step = optimizer.state[partition].get("step")
            if isinstance(step, torch.Tensor) and not isinstance(optimizer, Lamb):
                optimizer.state[partition]["step"] = step.to(partition.device, torch.float32)


def begin_with_weights(module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Give an engine's fp32 master weights these values, of which its fp16 or bf16 weights are the roundings.

    DeepSpeed makes the masters from the rounded weights. An update below half the distance of two bf16 numbers (2**-9
    of a weight) then leaves every weight where it is until several have added up, since all begin on such numbers.

    Args:
        module: the engine's.
        weights: fp32, by parameter name, as they were before deepspeed.initialize.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    for name, parameter in module.named_parameters():
        if name in weights and parameter.dtype != torch.float32:
            safe_set_full_fp32_param(parameter, weights[name])
