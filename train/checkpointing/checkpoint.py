"""Checkpoints that are whole or not there.

A checkpoint is written under checkpoints/.partial/, its files are flushed to disk and listed in complete.json
(integrity.py), and only then the folder is renamed to checkpoints/step-NNNNNNNN. A kill at any moment leaves either
the old state of affairs or the new one; a folder whose files do not match complete.json any more is passed over, with
a message.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_prep.shard_format.files import until_seen
from train.checkpointing.integrity import (
    Record,
    checkpoint_fault,
    flush,
    listed,
    read_facts,
    record_own_files,
    size_fault,
    write_facts,
)
from train.checkpointing.state import TrainState
from train.errors import CheckpointNotWrittenError
from train.optimizer import name_of


@dataclass(frozen=True)
class Retention:
    """Which complete checkpoints stay."""

    keep_last: int
    """The newest ones."""

    milestone_every_steps: int | None = None
    """Those at multiples of this step stay for good."""

    def superfluous(self, checkpoints: Sequence[Path]) -> list[Path]:
        """Those to remove: neither among the last, nor a milestone, nor the best by held-out loss.

        Args:
            checkpoints: complete ones, newest first.
        """
        facts = {path: read_facts(path) for path in checkpoints}
        scored = {path: fact.heldout_mlm_loss for path, fact in facts.items() if fact.heldout_mlm_loss}
        kept = {*checkpoints[: self.keep_last], *sorted(scored, key=lambda path: scored[path])[:1]}
        if every := self.milestone_every_steps:
            kept |= {path for path, fact in facts.items() if fact.step % every == 0}
        return [path for path in checkpoints if path not in kept]


@dataclass(frozen=True)
class Written:
    """What writing a checkpoint took."""

    seconds: float
    bytes: int


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


@dataclass(frozen=True)
class Checkpointer:
    """Writes the checkpoints of a run, `folder`/step-NNNNNNNN; every rank has one."""

    engine: Any
    folder: Path
    retention: Retention
    description: Path
    """Folder copied into each checkpoint, with which it can be exported wherever it is moved."""

    def save(self, state: TrainState, heldout_mlm_loss: float | None = None) -> Written:
        """Write a checkpoint, then remove superfluous ones; every rank calls this.

        Args:
            heldout_mlm_loss: of this step, where it was evaluated: the best checkpoint is kept.
        Raises:
            CheckpointNotWrittenError: on every rank, where any rank could not write; nothing is left half-written.
        """
        start, first = time.perf_counter(), dist.get_rank() == 0
        folder, name = self.folder, checkpoint_name(state.step)
        partial = folder / ".partial"
        fault = any_fault(_make_folder(partial / name, self.description) if first else None)
        if fault is None:
            fault = any_fault(_save_engine(self.engine, partial, name, state))
        if fault is None:
            records, fault = _record(partial / name)
            sizes = {file: record.size for file, record in records.items()}
            if fault is None and first:
                fault = unseen(partial / name, sizes)
            if fault is None and first:
                optimizer = name_of(self.engine.optimizer.optimizer)
                try:
                    write_facts(
                        partial / name,
                        state.step,
                        dist.get_world_size(),
                        records,
                        heldout_mlm_loss,
                        optimizer,
                    )
                    # A damaged one of this step, or step 0's of an earlier start.
                    _remove(folder / name, partial)
                    (partial / name).rename(folder / name)
                    flush(folder)
                except OSError as error:
                    fault = f"rank 0: {error}"
        if (fault := any_fault(fault)) is not None:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointNotWrittenError(f"checkpoint {folder / name} could not be written: {fault}")
        if first:
            # The start passed those of later steps over as damaged, maybe for a byte that `listed` does not read.
            until_now = [path for path in step_folders(folder) if path.name <= name]
            complete = [path for path in until_now if listed(path)[0] is not None]
            for old in self.retention.superfluous(complete):
                _remove(old, partial)
        dist.barrier()
        return Written(time.perf_counter() - start, sum(sizes.values()))


def _remove(checkpoint: Path, partial: Path) -> None:
    """Under its name no checkpoint is ever half there, and what a kill leaves of it goes with the next write. One that
    cannot be removed (a file held open on NFS) is no reason to stop: it is tried again."""
    removed = partial / f"{checkpoint.name}.removed"
    with contextlib.suppress(OSError):
        checkpoint.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole, by reading it; `say` is called for each one that is passed over."""
    for candidate in step_folders(folder):
        fault = checkpoint_fault(candidate)
        if fault is None:
            return candidate
        say(passed_over(candidate, fault))
    return None


def passed_over(checkpoint: Path, fault: str) -> str:
    """The line for the user about a damaged checkpoint."""
    return f"{checkpoint} is passed over: {fault}"


def _make_folder(folder: Path, description: Path) -> str | None:
    """What went wrong, or None."""
    try:
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copytree(description, folder / description.name)
    except OSError as error:
        return f"rank 0: {error}"
    return None


def _save_engine(engine: Any, partial: Path, name: str, state: TrainState) -> str | None:
    """What went wrong on this rank, or None."""
    try:
        engine.save_checkpoint(
            str(partial), tag=name, client_state={"halfling": asdict(state)}, save_latest=False
        )
    except (OSError, RuntimeError) as error:  # torch's writer makes a RuntimeError of a full disk
        dist.barrier()  # stands for the one at the end of engine.save_checkpoint, where the others wait
        return f"rank {dist.get_rank()}: {_first_line(error)}"
    return None


def _record(checkpoint: Path) -> tuple[dict[str, Record], str | None]:
    """Every rank flushes and digests what it wrote, all at once: the records of all, the first rank's fault or None."""
    rank, own, fault = dist.get_rank(), {}, None
    try:
        own = record_own_files(checkpoint, rank, dist.get_world_size())
    except OSError as error:
        fault = f"rank {rank}: {error}"
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (own, fault))
    records = {name: record for own, _ in gathered for name, record in own.items()}
    return records, next((fault for _, fault in gathered if fault is not None), None)


def unseen(folder: Path, sizes: Mapping[str, int]) -> str | None:
    """What this rank does not see of the files that others have written; None where it sees all, maybe after a while.

    Args:
        sizes: bytes, by path inside the folder.
    """
    fault = until_seen(lambda: size_fault(folder, sizes), folder)
    if fault is None:
        return None
    return (
        f"rank {dist.get_rank()} on {platform.node()} does not see in {folder} what others have written ({fault}): "
        "run.dir must lie on a file system that all hosts have mounted"
    )


def any_fault(fault: str | None) -> str | None:
    """The first rank's fault, on every rank."""
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    return next((fault for fault in faults if fault is not None), None)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    reason = text[0] if text else type(error).__name__
    # torch's zip writer reports a short write as a position that it did not expect.
    is_short = "unexpected pos" in reason or "PytorchStreamWriter" in reason
    return f"{reason} (is the disk full?)" if is_short else reason


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, newest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8), reverse=True)
