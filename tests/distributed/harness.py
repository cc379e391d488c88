"""Run one function on several real gloo ranks and bring back what each rank returned."""

from __future__ import annotations

import importlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
        call = Path(folder, "call.pickle")
        call.write_bytes(pickle.dumps((target, args, kwargs)))
        port = free_port()
        ranks = [_start_rank(rank, world_size, port, folder) for rank in range(world_size)]
        try:
            outputs = [rank.communicate(timeout=timeout_s)[0] for rank in ranks]
        except subprocess.TimeoutExpired:
            for rank in ranks:
                rank.kill()
            outputs = [rank.communicate()[0] for rank in ranks]
            raise AssertionError(f"no end within {timeout_s} s\n" + "\n".join(outputs)) from None
        codes = [rank.returncode for rank in ranks]
        assert codes == [0] * world_size, f"exit codes {codes}\n" + "\n".join(outputs)
        return [pickle.loads(Path(folder, f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _start_rank(rank: int, world_size: int, port: int, folder: str) -> subprocess.Popen[str]:
    env = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, "-m", "tests.distributed.harness", folder]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def _main(folder: str) -> None:
    import torch.distributed as dist

    target, args, kwargs = pickle.loads(Path(folder, "call.pickle").read_bytes())
    module, function = target.split(":")
    dist.init_process_group("gloo")
    result = getattr(importlib.import_module(module), function)(*args, **kwargs)
    Path(folder, f"result-{dist.get_rank()}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1])
