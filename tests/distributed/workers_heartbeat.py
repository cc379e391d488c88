"""One rank that only communicates, under a heartbeat, as train/run.py has it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from train.heartbeat import Heartbeat


def beat(folder: Path) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    world: Any = SimpleNamespace(rank=rank, world_size=world_size, is_first=rank == 0)
    with Heartbeat(world, lambda: "here", lost_after_s=5, stuck_after_s=600, folder=folder) as heartbeat:
        (folder / f"ready-{rank}").touch()
        try:
            while True:
                dist.all_reduce(torch.ones(1))
        except RuntimeError as error:
            print("error:", heartbeat.lost_rank(str(error).splitlines()[0]), flush=True)
            sys.exit(1)
