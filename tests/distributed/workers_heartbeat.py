"""One rank that communicates, or fails, under a heartbeat, as train/run.py has it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from launch.cli import run_main
from train.distributed import heartbeat as heartbeat_module
from train.distributed import world as world_module
from train.distributed.heartbeat import Heartbeat
from train.distributed.store import meet
from train.errors import NotMetError
from train.run import _lost_ranks_told


def beat(folder: Path) -> None:
    """Communicate until another rank is lost."""
    with joined(folder) as heartbeat:
        (folder / f"ready-{os.environ['RANK']}").touch()
        try:
            communicate()
        except RuntimeError as error:
            print("error:", heartbeat.lost_rank(str(error).splitlines()[0]), flush=True)
            sys.exit(1)


def fail(folder: Path, failing: Sequence[int]) -> None:
    """End with an error of the user's on the ranks `failing`; communicate on the others."""

    def main(_: Sequence[str]) -> int:
        with joined(folder) as heartbeat, _lost_ranks_told(heartbeat):
            if int(os.environ["RANK"]) in failing:
                raise ValueError("this teacher has no head")
            communicate()
        return 0

    run_main(main)


def lose_rank_0_at_start(folder: Path) -> None:
    """Rank 0 dies between the ranks' meeting and their hearts' first beat."""
    heartbeat = joined(folder)
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    try:
        heartbeat.__enter__()
    except NotMetError as error:
        print("error:", error, flush=True)
        sys.exit(1)


def freeze_at_start(folder: Path) -> None:
    """Rank 1 freezes between the ranks' meeting and their hearts' first beat."""
    heartbeat_module.WAIT_S = 3.0
    heartbeat = joined(folder)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)

    try:
        heartbeat.__enter__()
    except NotMetError as error:
        print("error:", error, flush=True)
        sys.exit(1)


def die_before_connecting() -> None:
    """Rank 1 dies between the ranks' meeting and their connections to each other."""

    def meet_and_die(rank: int, world_size: int, address: str, port: int) -> dist.Store:
        store = meet(rank, world_size, address, port)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return store

    world_module.meet = meet_and_die
    world_module.WAIT_S = 3.0

    try:
        world_module.join_world()
    except NotMetError as error:
        print("error:", error, flush=True)
        sys.exit(1)


def beat_without_a_reader(folder: Path) -> None:
    """As `beat`, with a stderr that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    sys.stderr = os.fdopen(writer, "w")
    beat(folder)


def joined(folder: Path) -> Heartbeat:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    world: Any = SimpleNamespace(rank=rank, world_size=world_size, is_first=rank == 0)
    return Heartbeat(world, lambda: "here", lost_rank_timeout_s=5, hang_timeout_s=600, folder=folder)


def communicate() -> None:
    while True:
        dist.all_reduce(torch.ones(1))
