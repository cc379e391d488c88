"""Which rank this process is, on which device it computes, and how the ranks find each other."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import transformers

# The last resort: train/heartbeat.py ends a job with a lost or stuck rank long before, and names the rank.
COLLECTIVE_TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class World:
    """Names this process once; printed as JSON in the run folder."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int
    device: str

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def discover_world(environment: Mapping[str, str]) -> World:
    """The ranks as the launcher's variables tell them; one rank where there are none.

    Reads RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_SIZE or LOCAL_WORLD_SIZE (deepspeed, torchrun).

    Raises:
        ValueError: some of the variables are missing, or they contradict each other.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    given = {name: environment[name] for name in names if name in environment}
    if given and len(given) < len(names):
        missing = ", ".join(name for name in names if name not in given)
        raise ValueError(
            f"the launcher set {given} but not {missing}: start with `deepspeed launch/pretrain.py`"
        )
    rank, local_rank, world_size = (
        int(given.get(name, default)) for name, default in zip(names, "001", strict=True)
    )
    if not (0 <= local_rank <= rank < world_size):
        raise ValueError(
            f"{given}: needs 0 <= LOCAL_RANK <= RANK < WORLD_SIZE; unset what an earlier job left"
        )
    local_size = int(environment.get("LOCAL_SIZE", environment.get("LOCAL_WORLD_SIZE", world_size)))
    device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    return World(rank, local_rank, world_size, local_size, device)


def join_world(log_level: str = "error") -> World:
    """Discover this process's rank and join the process group: NCCL on GPUs, gloo elsewhere."""
    world = discover_world(os.environ)
    _set_single_process_rendezvous(world)
    if world.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))
    else:
        torch.cuda.set_device(world.device)
    backend = "gloo" if world.device == "cpu" else "nccl"
    import_deepspeed(log_level).init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=COLLECTIVE_TIMEOUT
    )
    return world


def import_deepspeed(log_level: str = "error") -> Any:
    """The deepspeed package, made to say no more than `log_level`."""
    threshold = getattr(logging, log_level.upper())
    # DeepSpeed sets its logger's level when it is imported, and speaks while it is: only a filter is in time.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= threshold)
    if threshold > logging.WARNING:
        quiet_libraries()
        warnings.filterwarnings("ignore", module=r"deepspeed|torch\.jit|torch\.distributed|transformers")
    import deepspeed
    import deepspeed.ops

    # On a CPU this op would be compiled for about a minute at the first start; gloo does without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def quiet_libraries() -> None:
    """Hold back transformers' bars and remarks; errors still come."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def agree_to_stop(stop: bool, group: Any) -> bool:
    """True on every rank where it is true on any: one byte over gloo, no device is waited for."""
    flag = torch.tensor([int(stop)], dtype=torch.int32)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return bool(flag.item())


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum of `values` (any shape, on the rank's device) over all ranks, in place."""
    dist.all_reduce(values)
    return values


def _set_single_process_rendezvous(world: World) -> None:
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world.world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
