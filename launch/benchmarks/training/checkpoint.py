"""A checkpoint of a training run: written, digested, checked and loaded, beside the disk's own speed.

    python launch/benchmark.py checkpoint --ranks 1,2 --dir FOLDER

The run is that of `benchmark.py step`; FOLDER says which disk. Each part's seconds are the best of three; files are
read from the disk, as after a crash. "disk" is one file of as many bytes, by one process.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_prep.shard_format.files import write_json
from launch.benchmarks.options import Shape
from launch.benchmarks.training import settings, step
from launch.benchmarks.training.launching import measured
from launch.common.machine import hardware
from launch.common.tables import text_table
from train.build import Parts
from train.checkpointing.checkpoint import Checkpointer, Retention, checkpoint_name
from train.checkpointing.integrity import record_own_files
from train.checkpointing.resume import choose_checkpoint, load_checkpoint
from train.checkpointing.state import TrainState
from train.distributed.consistency import on_first_rank
from train.distributed.world import World, quiet_libraries
from train.errors import UserError
from train.export.hugging_face import description_folder, save_student_description
from train.models.build import origin_of
from train.run_folder import provenance

BLOCK = 2**22


def add_arguments(parser: argparse.ArgumentParser) -> None:
    step.add_common_arguments(parser)
    parser.add_argument(
        "--dir", type=Path, help="a folder on the disk to measure (default: the system's for temporary files)"
    )


def main(args: argparse.Namespace) -> int:
    if args.dir and not args.dir.is_dir():
        raise UserError(f"--dir={args.dir} is no folder; make it first")
    objective, shape = settings.objectives_of(args.model)[0], Shape(1, 64)
    quiet_libraries()
    rows = []
    for ranks in args.ranks:

        def spec(folder: Path, ranks: int = ranks) -> dict[str, Any]:
            run = settings.settings(args.model, objective, shape, ranks, 1, folder)
            return {"kind": "checkpoint", "contenders": {"ours": run}}

        figures = measured(spec, ranks, args.dir and args.dir.absolute())
        rows.append({"model": args.model, "ranks": ranks, **figures})
    print(as_text(rows))
    if args.json:
        write_json(args.json, {"machine": hardware(), **provenance(), "checkpoints": rows})
    return 0


def as_text(rows: list[dict[str, Any]]) -> str:
    """A table."""
    shown = [
        [
            row["model"],
            str(row["ranks"]),
            f"{row['bytes'] / 2**20:,.0f}",
            name,
            f"{seconds:.2f}",
            f"{row['bytes'] / seconds / 2**20:,.0f}",
        ]
        for row in rows
        for name, seconds in row["seconds"].items()
    ]
    return text_table(("model", "ranks", "MiB", "part", "seconds", "MiB/s"), shown, title="a checkpoint")


def measured_checkpoint(parts: Parts, folder: Path, world: World, rounds: int = 3) -> dict[str, Any]:
    """Seconds of each part, the best of `rounds`; every rank calls this.

    Files are read from the disk, as after a crash: what the system kept of them in memory is dropped before.
    """
    engine, origin = parts.trainer.engine, origin_of(parts.config)
    on_first_rank(
        world, lambda: save_student_description(folder, parts.student, parts.tokenizer_source, origin)
    )
    checkpoints = folder / "checkpoints"
    checkpointer = Checkpointer(engine, checkpoints, Retention(1), description_folder(folder))
    seconds: dict[str, list[float]] = {}
    for number in range(1, rounds + 1):
        written = checkpointer.save(TrainState(number))
        took = {"write, digest included": written.seconds}
        path = checkpoints / checkpoint_name(number)
        took["digest alone"] = _timed(world, path, record_own_files, path, world.rank, world.world_size)
        took["check"] = _timed(world, path, choose_checkpoint, checkpoints, _say_nothing)
        took["load"] = _timed(world, path, load_checkpoint, engine, path, world.world_size, _say_nothing)
        took |= on_first_rank(world, functools.partial(_disk, folder, written.bytes)) or {}
        dist.barrier()
        for name, value in took.items():
            seconds.setdefault(name, []).append(value)
    best = {name: min(values) for name, values in seconds.items()}
    return {"bytes": written.bytes, "seconds": best, "all_seconds": seconds}


def _timed(world: World, checkpoint: Path, function: Callable[..., Any], *args: Any) -> float:
    """Seconds until all ranks have done it, the checkpoint's files read from the disk."""
    on_first_rank(world, lambda: _drop_from_memory(checkpoint))
    dist.barrier()
    start = time.perf_counter()
    function(*args)
    dist.barrier()
    return time.perf_counter() - start


def _say_nothing(message: str) -> None:
    """For what is said to a user."""


def _drop_from_memory(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _disk(folder: Path, size: int) -> dict[str, float]:
    """Seconds of writing and flushing one file of `size` bytes, and of reading it."""
    path, block = folder / "disk", os.urandom(BLOCK)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-size // BLOCK)):
            file.write(block)
        os.fsync(file.fileno())
    written = time.perf_counter() - start
    _drop_from_memory(folder)
    start, buffer = time.perf_counter(), bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    read = time.perf_counter() - start
    path.unlink()
    return {"disk, written": written, "disk, read": read}
