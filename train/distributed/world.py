"""Which rank this process is, on which device it computes, and how the ranks find each other."""

from __future__ import annotations

import logging
import os
import platform
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import transformers

from train.distributed.collective_errors import cause_of, is_from_a_collective
from train.distributed.device import device_of, num_visible_gpus, unused_gpus
from train.distributed.discovery import Ranks, discover_ranks
from train.distributed.host_memory import keep_freed_memory
from train.distributed.rendezvous import interface_towards, rendezvous
from train.distributed.store import WAIT_S, compare_devices, compare_versions, join_store
from train.errors import RankError, RendezvousError
from train.versions import installed_versions

# The last resort: train/distributed/heartbeat.py ends a job with a lost or stuck rank long before, and names the rank.
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
    def kind(self) -> str:
        """ "cuda" or "cpu"."""
        return self.device.partition(":")[0]

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def join_world(log_level: str = "error") -> World:
    """Discover this process's rank and join the process group: NCCL on GPUs, gloo elsewhere.

    Raises:
        RankError: contradicting variables, too few GPUs, a taken port, a host name that nobody knows.
        UserError: ranks share a GPU, or some have none; they run different versions.
        RendezvousError: a rank did not come.
    """
    ranks = discover_ranks(os.environ)
    device = device_of(ranks, os.environ, num_visible_gpus(), platform.node())
    world = World(ranks.rank, ranks.local_rank, ranks.world_size, ranks.local_size, device)
    if world.local_rank == 0 and (remark := unused_gpus(os.environ, device)):
        print(f"warning: {platform.node()}: {remark}", file=sys.stderr, flush=True)
    address, port = _set_torch_variables(world, ranks)
    torch.set_num_threads(_num_threads(world))  # on GPUs too: models are loaded and rounded on the host
    if world.device == "cpu":
        keep_freed_memory()
    else:
        torch.cuda.set_device(world.device)
    backend = "gloo" if world.device == "cpu" else "nccl"
    if backend == "nccl" and not dist.is_nccl_available():
        raise RankError(
            f"torch {torch.__version__} on {platform.node()} has no NCCL, by which ranks on GPUs communicate: install "
            "a build that has it (pip's for Linux do), or set DS_ACCELERATOR=cpu"
        )
    deepspeed = import_deepspeed(log_level)
    store = join_store(world.rank, world.world_size, address, port)
    compare_versions(store, world.rank, world.world_size, installed_versions(), WAIT_S)
    compare_devices(store, world.rank, world.world_size, world.kind, _uuid(world.device), WAIT_S)
    _connect(backend, store, world)
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=COLLECTIVE_TIMEOUT
    )
    return world


def _connect(backend: str, store: dist.Store, world: World) -> None:
    """Make the process group, with a shorter patience than for collectives: all ranks were there a moment ago."""
    soon = timedelta(seconds=WAIT_S) if backend == "gloo" else COLLECTIVE_TIMEOUT  # NCCL connects later
    try:
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.world_size, timeout=soon
        )
    except RuntimeError as error:
        if not is_from_a_collective(error):
            raise
        raise RendezvousError(
            f"rank {world.rank} on {platform.node()} lost another rank while the job started ({cause_of(error)}); run "
            "again"
        ) from error
    if soon != COLLECTIVE_TIMEOUT:
        dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT)


def _set_torch_variables(world: World, ranks: Ranks) -> tuple[str, int]:
    """Set the variables that torch and DeepSpeed read, whoever started this process; rank 0's address and port."""
    address, port = rendezvous(os.environ, ranks)
    os.environ.update(
        RANK=str(world.rank),
        LOCAL_RANK=str(world.local_rank),
        WORLD_SIZE=str(world.world_size),
        LOCAL_SIZE=str(world.local_size),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        DS_ACCELERATOR=world.kind,
    )
    if world.local_size < world.world_size and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = interface_towards(address)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    return address, port


def _num_threads(world: World) -> int:
    """OMP_NUM_THREADS, or this rank's share of the host's cores and no more than Slurm or mpirun bound it to."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list is by nesting depth
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return max(1, min(len(os.sched_getaffinity(0)), (os.cpu_count() or 1) // world.local_size))


def _uuid(device: str) -> str:
    """The GPU itself, whatever number it has; "" for a CPU."""
    return "" if device == "cpu" else str(torch.cuda.get_device_properties(device).uuid)


class _AtLeast(logging.Filter):
    """Lets records through that are as grave as `level`, or graver."""

    level = logging.ERROR

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self.level


_DEEPSPEED_FILTER = _AtLeast()


def set_deepspeed_log_level(log_level: str | None = None) -> None:
    """Print DeepSpeed's messages of `log_level` ("debug", "info", "warning", "error") and above, and no others.

    None: as set before; "error" at first.
    """
    if log_level is not None:
        _DEEPSPEED_FILTER.level = getattr(logging, log_level.upper())
    logger = logging.getLogger("DeepSpeed")
    logger.addFilter(_DEEPSPEED_FILTER)
    logger.setLevel(_DEEPSPEED_FILTER.level)


def import_deepspeed(log_level: str | None = None) -> Any:
    """The deepspeed package, with `set_deepspeed_log_level` in force."""
    set_deepspeed_log_level(log_level)  # it logs while it is imported
    if _DEEPSPEED_FILTER.level > logging.WARNING:
        quiet_libraries()
        warnings.filterwarnings("ignore", module=r"deepspeed|torch\.jit|torch\.distributed|transformers")
    import deepspeed
    import deepspeed.ops

    set_deepspeed_log_level()  # and sets its logger's level then
    _import_muon()
    if deepspeed.get_accelerator().device_name() == "cpu":
        # This op would be compiled for about a minute at the first start, and every rank would leave 66 MiB in
        # /dev/shm for good; gloo does without it. On GPUs the table would try 23 builders, and print about each.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _import_muon() -> None:
    """Import DeepSpeed's Muon without torch's compiler.

    Every engine imports it and none here uses it; its functions are decorated with torch.compile, which would load the
    compiler: two seconds of each rank's start.
    """
    name = "TORCHDYNAMO_DISABLE"  # torch reads it at each torch.compile; no model's falls into this import
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def quiet_libraries() -> None:
    """Hold back transformers' bars and remarks; errors still come."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
