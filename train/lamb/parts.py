"""What a step may update: the checks it makes before it changes anything.

The fused kernels are given raw addresses, so that whatever they read and write must be of the parameter's size,
dtype and device, and contiguous. Moments are converted where that loses nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


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
