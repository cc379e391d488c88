"""Checkpoints that are whole or not there.

A checkpoint is written under checkpoints/.partial/, its files are flushed to disk and listed with their sizes
in complete.json, and only then the folder is renamed to checkpoints/step-NNNNNNNN. A kill at any moment
leaves either the old state of affairs or the new one; a folder whose files do not match complete.json any
more is passed over, aloud.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from train.run_folder import write_json


@dataclass(frozen=True)
class TrainState:
    """All that a run has to remember beside the engine's tensors. Order, masks, learning rate and dropout
    are functions of the step."""

    step: int = 0
    """Optimizer steps done."""

    non_finite_in_a_row: int = 0
    """Steps with a non-finite gradient since the last good one."""


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def save_checkpoint(engine: Any, folder: Path, state: TrainState, world_size: int, keep_last: int) -> float:
    """Write checkpoint `folder`/step-NNNNNNNN; every rank calls this.

    Returns:
        Seconds that it took.
    """
    start = time.perf_counter()
    partial, name = folder / ".partial", checkpoint_name(state.step)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(
        str(partial), tag=name, client_state={"halfling": asdict(state)}, save_latest=False
    )
    dist.barrier()
    if dist.get_rank() == 0:
        _complete(partial / name, state, world_size)
        shutil.rmtree(folder / name, ignore_errors=True)
        (partial / name).rename(folder / name)
        _flush(folder)
        for old in _step_folders(folder)[keep_last:]:
            shutil.rmtree(old)
    dist.barrier()
    return time.perf_counter() - start


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint, or None; `say` is told of each one that is passed over."""
    for candidate in _step_folders(folder):
        fault = _fault(candidate)
        if fault is None:
            return candidate
        say(f"{candidate} is passed over: {fault}")
    return None


def load_checkpoint(engine: Any, checkpoint: Path, world_size: int) -> TrainState:
    """Load engine and state from a complete checkpoint; every rank calls this.

    Raises:
        ValueError: it was written by another number of ranks.
    """
    saved_by = json.loads((checkpoint / "complete.json").read_text())["world_size"]
    if saved_by != world_size:
        raise ValueError(
            f"{checkpoint} was written by {saved_by} ranks and this job has {world_size}; start {saved_by} ranks"
        )
    path, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise ValueError(
            f"{checkpoint}: DeepSpeed found nothing to load there; remove the folder and start again"
        )
    return TrainState(**client_state["halfling"])


def _step_folders(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8), reverse=True)


def _complete(path: Path, state: TrainState, world_size: int) -> None:
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    for file in files:
        _flush(file)
    write_json(
        path / "complete.json",
        {
            **asdict(state),
            "world_size": world_size,
            "files": {str(file.relative_to(path)): file.stat().st_size for file in files},
        },
    )
    _flush(path)


def _fault(checkpoint: Path) -> str | None:
    try:
        files = json.loads((checkpoint / "complete.json").read_text())["files"]
    except (OSError, ValueError, KeyError):
        return "complete.json is missing or unreadable"
    for name, size in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
