"""Run one function on several real gloo ranks and bring back what each rank returned."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.distributed.ranks.forked import Forked
from train.distributed.rendezvous import free_port


def run_ranks(target: str, world_size: int, *args: Any, timeout_s: float = 240, **kwargs: Any) -> list[Any]:
    """Call `target` ("package.module:function") on `world_size` processes joined by gloo.

    Each process has RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set and torch.distributed
    initialised; it calls `function(*args, **kwargs)`. Arguments and results travel by pickle.

    Returns:
        The results, by rank.
    Raises:
        AssertionError: a rank failed or ran out of time; the message holds the output of every rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [
            Forked(_main, target, args, kwargs, folder, environment=rank_environment(rank, world_size, port))
            for rank in range(world_size)
        ]
        try:
            outputs = [rank.communicate(timeout=timeout_s)[0] for rank in ranks]
        except subprocess.TimeoutExpired:
            for rank in ranks:
                rank.kill()
            outputs = [rank.communicate()[0] for rank in ranks]
            raise AssertionError(f"no end within {timeout_s} s\n" + "\n".join(outputs)) from None
        codes = [rank.returncode for rank in ranks]
        assert codes == [0] * world_size, f"exit codes {codes}\n" + "\n".join(outputs)
        # DeepSpeed's own all-reduce for CPUs leaves 66 MiB there for each rank; train/distributed/world.py avoids it.
        assert list(Path("/dev/shm").glob(f"*_{port}_*")) == []
        return [pickle.loads(Path(folder, f"result-{rank}").read_bytes()) for rank in range(world_size)]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """This process's variables and those that a launcher gives to a rank on this host."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }


def srun_variables(rank: int, job: int) -> dict[str, str]:
    """What srun gives to one of three tasks on this host."""
    numbers = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": 3, "SLURM_JOB_ID": job}
    numbers |= {"SLURM_STEP_TASKS_PER_NODE": 3, "SLURM_NODEID": 0}
    return {name: str(value) for name, value in numbers.items()} | {"SLURM_JOB_NODELIST": "localhost"}


def _main(target: str, args: Sequence[Any], kwargs: Mapping[str, Any], folder: str) -> None:
    import torch.distributed as dist

    module, function = target.split(":")
    dist.init_process_group("gloo")
    result = getattr(importlib.import_module(module), function)(*args, **kwargs)
    Path(folder, f"result-{dist.get_rank()}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
