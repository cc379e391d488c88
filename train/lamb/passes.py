"""Which implementation of the two passes updates the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from . import native
from .eager import EagerPasses
from .formula import Passes


def choose_passes(
    fused: bool | None, device: torch.device, dtype: torch.dtype, agree: Callable[[bool], bool] | None = None
) -> Passes:
    """The fastest passes for tensors of `dtype` on `device`.

    Args:
        fused: False for plain torch operations; True to insist on a fused kernel; None for one where it can be
            had.
        agree: tells from "this rank has a fused kernel" whether all ranks have; collective. None: one process.
    Raises:
        ValueError: fused is True, and there is none here, or none on another rank: then on every rank.
    """
    kernel = None if fused is False else _fused_passes(device, dtype)
    everywhere = kernel is not None if agree is None else agree(kernel is not None)
    if kernel is not None and everywhere:
        return kernel
    if fused:
        where = "here" if kernel is None else "on another rank"
        raise ValueError(
            f"fused=True, but there is no fused LAMB for {dtype} on {device.type} {where}: it takes fp32 and a C "
            "compiler (CPU) or Triton (CUDA); leave fused at None for plain torch operations"
        )
    return EagerPasses()


def all_ranks_have(have: bool, device: torch.device, group: Any) -> bool:
    """Whether `have` is true on every rank of `group`: one 4-byte all-reduce."""
    if not dist.is_initialized() or dist.get_world_size(group=group) == 1:
        return have
    least = torch.tensor(int(have), dtype=torch.int32, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    return bool(least)


def _fused_passes(device: torch.device, dtype: torch.dtype) -> Passes | None:
    if dtype != torch.float32:
        return None
    if device.type == "cpu" and (library := native.build()) is not None:
        return native.NativePasses(library)
    if device.type == "cuda":
        try:
            from .triton_kernels import TritonPasses
        except ImportError:
            return None
        return TritonPasses()
    return None
