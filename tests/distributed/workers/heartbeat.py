"""One rank that communicates, fails or hangs under a heartbeat, as train/run.py has it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from launch.common.cli import run_main
from train.distributed import world as world_module
from train.distributed.heartbeat import Heartbeat
from train.distributed.store import join_store


def communicate(folder: Path) -> None:
    """Communicate until another rank is lost."""
    _run(lambda: _ready(folder))


def communicate_without_a_reader(folder: Path) -> None:
    """With a stderr that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    sys.stderr = os.fdopen(writer, "w")
    communicate(folder)


def hang() -> None:
    """Stay in one place for longer than hang_timeout_s."""
    _run(lambda: time.sleep(60))


def fail(failing: Sequence[int], error: Exception) -> None:
    """Raise `error` on the ranks `failing`; communicate on the others."""

    def act() -> None:
        if int(os.environ["RANK"]) in failing:
            raise error

    _run(act)


def end_at_start(rank: int, number: int) -> None:
    """`rank` gets the signal `number` after the ranks have joined and before its heartbeat starts."""

    def act() -> None:
        time.sleep(0.5)  # by then the others have joined too, on a busy machine as well
        if os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), number)
        time.sleep(0.5)

    _run(lambda: None, at_start=act)


def die_before_connecting() -> None:
    """Rank 1 dies after the ranks have joined the store and before they connect to each other."""

    def join_and_die(rank: int, world_size: int, address: str, port: int) -> dist.Store:
        store = join_store(rank, world_size, address, port)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return store

    world_module.join_store = join_and_die
    world_module.WAIT_S = 3.0
    _run(lambda: None)


def _run(act: Callable[[], None], at_start: Callable[[], None] = lambda: None) -> None:
    def main(_: Sequence[str]) -> int:
        world = world_module.join_world()
        at_start()
        with Heartbeat(world, lambda: "here", lost_rank_timeout_s=5, hang_timeout_s=8):
            act()
            while True:
                dist.all_reduce(torch.ones(1))

    run_main(main, one_job=True)


def _ready(folder: Path) -> None:
    (folder / f"ready-{os.environ['RANK']}").touch()
