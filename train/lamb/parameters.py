"""Which tensors Lamb updates and how, and the checks of its arguments, parameters, gradients and state.

All checks of a step come before it changes anything. The fused kernels are given raw addresses, so that whatever they
read and write must be of the parameter's size, dtype and device, and contiguous.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")

# A module or parameter whose name ends so is a normalisation layer: LayerNorm, layer_norm, sa_layer_norm,
# input_layernorm, attn_norm, final_norm, RMSNorm, norm1, ln_f. "normalizer" or "norm_scale_proj" is not.
_NORM = re.compile(r"norm_?\d*$|^ln(\d*|_\w+)$", re.IGNORECASE)


@dataclass(frozen=True)
class TensorRule:
    """How one parameter tensor takes part in LAMB."""

    name: str
    decay: bool
    """Weight decay enters its update."""
    adapt: bool
    """Its step is scaled by a trust ratio; otherwise the ratio is 1."""


def is_bias_or_norm(name: str, ndim: int) -> bool:
    """Whether a parameter is a bias or belongs to a normalisation layer, whatever its family calls it.

    Either criterion is enough: the name (a last component `bias`, or a component that names a normalisation
    layer) or a shape of at most one dimension, which in these models nothing else has.
    """
    components = name.split(".")
    return components[-1] == "bias" or ndim <= 1 or any(_NORM.search(part) for part in components)


def tensor_rules(
    named_parameters: Sequence[tuple[str, torch.Tensor]], *, adapt_all: bool, decay_all: bool
) -> tuple[TensorRule, ...]:
    """The rule of each tensor: biases and norms take neither decay nor adaptation unless asked.

    Args:
        adapt_all: scale every tensor's step by its own trust ratio.
        decay_all: apply weight decay to every tensor.
    """
    return tuple(
        TensorRule(
            name=name,
            decay=decay_all or not is_bias_or_norm(name, parameter.ndim),
            adapt=adapt_all or not is_bias_or_norm(name, parameter.ndim),
        )
        for name, parameter in named_parameters
    )


def optimized_parameters(
    named_parameters: Iterable[tuple[str, torch.Tensor]],
) -> list[tuple[str, torch.Tensor]]:
    """The trainable, non-empty tensors, each once: a tied weight keeps the first of its names.

    Raises:
        ValueError: bare tensors instead of (name, tensor) pairs, two tensors of one name, or of one memory,
            FSDP's flat parameters, or none to train.
    """
    first_name: dict[int, str] = {}
    at: dict[tuple[torch.device, int], str] = {}
    kept: dict[str, torch.Tensor] = {}
    for item in named_parameters:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise ValueError(
                f"Lamb needs (name, parameter) pairs and got {type(item).__name__}: pass "
                "model.named_parameters(), not model.parameters() (the names decide decay and adaptation)"
            )
        name, parameter = item
        if name.split(".")[-1] == "_flat_param":
            raise ValueError(
                f"{name} is FSDP's flat shard of many tensors, in which Lamb cannot find them: train with "
                "DeepSpeed's ZeRO stage 1 or 2"
            )
        if not parameter.requires_grad or parameter.numel() == 0 or id(parameter) in first_name:
            continue
        if name in kept:
            raise ValueError(f"two different parameters are named {name!r}: give every tensor its own name")
        place = (parameter.device, parameter.data_ptr())
        if place in at and place[1] != 0:
            raise ValueError(
                f"{at[place]} and {name} are two parameters that share their memory, which would be updated twice: tie "
                "them by making both names one Parameter"
            )
        first_name[id(parameter)] = at[place] = name
        kept[name] = parameter
    if not kept:
        raise ValueError("Lamb got no trainable parameter: every one is frozen, empty or missing")
    return list(kept.items())


def check_arguments(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clamp: tuple[float, float] | None,
) -> None:
    """ValueError where a number is out of range."""
    if not 0 <= lr < float("inf"):
        raise ValueError(f"lr is {lr}: it must be a finite number, 0 or more")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are {betas}: both must be at least 0 and below 1")
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps is {eps}: it must be a finite number above 0")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay is {weight_decay}: it must be a finite number, 0 or more")
    if clamp is not None and not 0 <= clamp[0] <= clamp[1]:
        raise ValueError(f"clamp is {clamp}: give (low, high) with 0 <= low <= high")


def check_mode(mode: str, *, prenormalize: bool, adapt_all: bool) -> None:
    """ValueError where the mode is unknown, or an option would have no effect in it."""
    if mode not in ("decoupled", "deepspeed"):
        raise ValueError(f"mode is {mode!r}: choose 'decoupled' or 'deepspeed'")
    if mode == "deepspeed" and prenormalize:
        raise ValueError(
            "prenormalize has no place in mode 'deepspeed', whose formula has none: drop one of them"
        )
    if mode == "deepspeed" and adapt_all:
        raise ValueError(
            "adapt_all would change nothing in mode 'deepspeed', which adapts all tensors: drop it"
        )


def check_not_replaced(held: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> None:
    """That an optimizer which is not bound holds the parameters it was given.

    Raises:
        ValueError: it holds a flat partition, or copies.
    """
    if len(held) == len(given):
        pairs = list(zip(held, given, strict=True))
        if all(a is b for a, b in pairs):
            return
        if len(pairs) > 1 and all(a.shape == b.shape for a, b in pairs):
            raise ValueError(
                "Lamb was asked to step on copies of its parameters: DeepSpeed's stage 0 does so in fp16 and "
                "bf16 while it builds its engine; set zero_optimization.stage to 1 or 2"
            )
    raise ValueError(
        "Lamb's parameters were replaced, most likely by a DeepSpeed engine's flat partition, and it "
        "cannot know where each tensor lies: call optimizer.bind(engine) after deepspeed.initialize"
    )


def check_updatable(name: str, parameter: torch.Tensor) -> None:
    """That the parameter and its gradient can be updated.

    Raises:
        ValueError: a sparse gradient, one of another shape, dtype or device, a parameter of low precision, or
            either of them without memory of its own.
    """
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse:
        raise ValueError(
            f"Lamb needs dense gradients and got a sparse one for {name}: set sparse=False in the embedding"
        )
    if parameter.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"Lamb was given {parameter.dtype} parameters to update ({name}), which would lose most updates to "
            "rounding: keep fp32 master weights (a DeepSpeed bf16 or fp16 engine, or torch.autocast)"
        )
    fits = gradient.shape == parameter.shape and gradient.dtype == parameter.dtype
    if not fits or gradient.device != parameter.device:
        raise ValueError(
            f"the gradient of {name} is {_describe(gradient)} and its parameter {_describe(parameter)}: give it a "
            "gradient of the parameter's own shape, dtype and device (leave the parameter's grad_dtype unset)"
        )
    for what, tensor in (("parameter", parameter), ("gradient", gradient)):
        if tensor.data_ptr() == 0 and tensor.numel() > 0:
            raise ValueError(
                f"the {what} {name} ({type(tensor).__name__} on {tensor.device}) has no memory of its own: Lamb needs "
                "plain tensors (for sharded ones use DeepSpeed's ZeRO stage 1 or 2)"
            )
    if parameter.is_neg():
        raise ValueError(
            f"{name} is a lazy negation of another tensor, which no step can change: pass a plain one"
        )


def one_kind(parameters: Sequence[torch.Tensor]) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of all parameters.

    Raises:
        ValueError: they have more than one.
    """
    kinds = {(parameter.device, parameter.dtype) for parameter in parameters}
    if len(kinds) > 1:
        raise ValueError(
            "Lamb needs its parameters on one device and of one dtype, and got "
            + ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
        )
    return next(iter(kinds))


def ready_state(name: str, parameter: torch.Tensor, state: dict[str, Any]) -> None:
    """Make the state of a parameter, or bring a loaded one to the parameter's dtype, device and plain layout.

    Args:
        state: step (int) and two moments of the parameter's shape; filled and changed in place, but for `step`.
    Raises:
        ValueError: a loaded state lacks one of them, or holds a moment of another shape.
    """
    if not state:
        state["step"] = 0
        for key in MOMENTS:
            state[key] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    for key in ("step", *MOMENTS):
        if key not in state:
            raise ValueError(
                f"the state of {name} has no {key}, only {', '.join(map(str, state))}: load a state of Lamb or "
                "Adam, or none"
            )
    for key in MOMENTS:
        moment = state[key]
        if moment.shape != parameter.shape:
            raise ValueError(
                f"{key} of {name} has shape {tuple(moment.shape)} and the parameter {tuple(parameter.shape)}: "
                "the state was saved for other parameters, or for these in another order; build Lamb from the "
                "model that it was saved with"
            )
    for key in MOMENTS:
        state[key] = state[key].to(parameter).contiguous()


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
