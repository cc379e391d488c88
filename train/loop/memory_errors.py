"""Out of memory: one message that says where, with which micro batch, and what to set."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from train.config import Config
from train.data.order import fitting_micro_batches
from train.distributed.world import World
from train.errors import OutOfMemoryError, one_line

SIGNS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)


@contextmanager
def explained_memory_errors(
    config: Callable[[], Config], world: World, where: Callable[[], str]
) -> Iterator[None]:
    """Around a run.

    Args:
        config: with the micro batch that was found for "auto", once it is.
        where: what the main thread is doing.
    Raises:
        OutOfMemoryError: in place of torch's errors of that kind.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(_message(config(), world, where(), error)) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch, or a CUDA library below it, found no memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)


def _message(config: Config, world: World, where: str, error: RuntimeError) -> str:
    size = config.training.micro_batch_size
    smaller = [
        number
        for number in fitting_micro_batches(
            config.training.global_batch_size, config.data.lanes, world.world_size
        )
        if not isinstance(size, int) or number < size
    ]
    remedy = "shorten data.sequence_length, or take a device with more memory"
    if smaller:
        fitting = ", ".join(str(number) for number in smaller[-4:][::-1])
        remedy = (
            f"set training.micro_batch_size lower ({fitting} fit the global batch), and "
            "--checkpoint.allow_changed_config=true to go on with this run"
        )
    others = "nvidia-smi shows whether" if world.kind == "cuda" else "look whether"
    return (
        f"rank {world.rank} on {platform.node()} is out of memory on {world.device}, in {where}, with "
        f"training.micro_batch_size={size} of data.sequence_length={config.data.sequence_length} tokens: {remedy}; "
        f"{others} other programs hold memory there ({one_line(error, 500)})"
    )
