"""Which checkpoint a start goes on from, and how it is loaded, also on another number of ranks.

DeepSpeed's own checkpoints hold one partition per rank and load on the same number of ranks alone. For another
number rank 0 converts the checkpoint to DeepSpeed's universal form first, beside the checkpoints, and the copy is
removed once it is loaded. The data order, the masks and dropout do not depend on the number of ranks, so that the
run goes on with the same batches.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train.checkpointing.checkpoint import any_fault, passed_over, step_folders, unseen
from train.checkpointing.integrity import Facts, content_fault, listed, read_facts
from train.checkpointing.safe_load import weights_only
from train.checkpointing.state import TrainState
from train.distributed.consistency import as_on_first_rank
from train.distributed.signals import stop_signals_blocked_in_children
from train.errors import BAD_USAGE, RankError, UserError, one_line
from train.optimizer import after_loading, own_settings

ROOT = Path(__file__).resolve().parents[2]
UNIVERSAL = ".universal"


def choose_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint, on every rank; None where the run has none yet.

    Rank 0 says which there are and what they hold; each rank reads its share of the files.

    Args:
        say: called for each one that is passed over.
    Raises:
        UserError: there are checkpoints, and none is whole; a rank does not see the files that rank 0 does.
    """
    first, faults = dist.get_rank() == 0, []
    if first:
        shutil.rmtree(folder / UNIVERSAL, ignore_errors=True)  # of a start that was killed
    for candidate in as_on_first_rank(step_folders(folder) if first else []):
        facts, fault = as_on_first_rank(listed(candidate) if first else (None, None))
        if facts is not None:
            fault = any_fault(_fault_of_share(candidate, facts))
        if fault is None:
            return candidate
        faults.append(passed_over(candidate, fault))
        say(faults[-1])
    if faults:
        raise UserError(
            "; ".join(faults)
            + f"; no checkpoint in {folder} is whole: restore one, or remove them all to start again at step 0"
        )
    return None


def _fault_of_share(checkpoint: Path, facts: Facts) -> str | None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    read = {*facts.share(rank, world_size), *facts.share(0, world_size)}
    if rank and (fault := unseen(checkpoint, {name: facts.files[name] for name in read})) is not None:
        raise RankError(fault)
    return content_fault(checkpoint, facts, rank, world_size)


def refuse_other_optimizer(checkpoint: Path | None, name: str) -> None:
    """UserError where a checkpoint holds another optimizer's state: the run folder's config.yaml may be gone.

    Every rank calls this.

    Args:
        name: optimizer.name.
    """
    if checkpoint is not None and (saved := _facts(checkpoint).optimizer) != name:
        raise UserError(
            f"{checkpoint} was written with optimizer.name={saved}, whose state means nothing to {name}; give "
            f"optimizer.name={saved}, or another run.dir"
        )


def needs_conversion(checkpoint: Path | None, world_size: int) -> bool:
    """Whether the checkpoint was written by another number of ranks; every rank calls this."""
    return checkpoint is not None and _facts(checkpoint).world_size != world_size


def load_checkpoint(
    engine: Any, checkpoint: Path | None, world_size: int, say: Callable[[str], None]
) -> TrainState:
    """Load engine and state; every rank calls this.

    Args:
        engine: made with load_universal where `needs_conversion` says so.
        checkpoint: None starts at step 0.
    Raises:
        UserError: DeepSpeed cannot read or convert it; it is of a run that trained other parameters.
    """
    if checkpoint is None:
        return TrainState()
    with weights_only(checkpoint):
        _refuse_other_trained(engine, checkpoint)
    source, written_by = checkpoint, _facts(checkpoint).world_size
    if written_by != world_size:
        say(f"continuing from {checkpoint}, written by {written_by} ranks; converting it for {world_size}")
        source = _convert(checkpoint, written_by)
    else:
        say(f"continuing from {checkpoint}")
    optimizer = engine.optimizer.optimizer
    settings = own_settings(optimizer)
    try:
        with weights_only(checkpoint):
            path, client_state = engine.load_checkpoint(str(source.parent), tag=source.name)
            if source != checkpoint:
                _load_frozen(engine, checkpoint)
    except RuntimeError as error:
        if "state_dict" not in str(error) and "size" not in str(error):
            raise
        raise UserError(
            f"{checkpoint} holds another model than the configuration describes "
            f"({one_line(error, 200)}); give the model.* keys it was trained with, or another run.dir"
        ) from None
    if path is None:
        raise UserError(
            f"{checkpoint}: DeepSpeed found nothing to load there; remove the folder and start again"
        )
    after_loading(optimizer, settings)
    dist.barrier()
    if source != checkpoint and dist.get_rank() == 0:
        shutil.rmtree(source.parent)
    try:
        return TrainState.from_dict(client_state["halfling"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoint}: its state is none of this project's ({one_line(error, 100)}); remove it to go on "
            "from the one before"
        ) from None


def _refuse_other_trained(engine: Any, checkpoint: Path) -> None:
    """UserError where the same parameters are there, and others of them are trained: DeepSpeed fails on the state that
    is missing with an error that says nothing of it."""
    file = engine._get_ckpt_name(str(checkpoint.parent), checkpoint.name)
    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    before = {name for group in saved["param_shapes"] for name in group}
    trained = {name: each.requires_grad for name, each in engine.module.named_parameters()}
    changed = sorted(before ^ {name for name in trained if trained[name]})
    if changed and trained.keys() == before | set(saved["frozen_param_shapes"] or {}):
        raise UserError(
            f"{checkpoint} is of a run whose objective trained other parameters ({len(changed)} differ, from "
            f"{changed[0]} on); give the objective.* weights of that run, or another run.dir"
        )


def _load_frozen(engine: Any, checkpoint: Path) -> None:
    """The parameters that are not trained, which DeepSpeed's universal form does not hold."""
    frozen = {name: each for name, each in engine.module.named_parameters() if not each.requires_grad}
    if frozen:
        file = engine._get_ckpt_name(str(checkpoint.parent), checkpoint.name)
        saved = torch.load(file, map_location="cpu", weights_only=True)["module"]
        for name, parameter in frozen.items():
            parameter.data.copy_(saved[name])


def _facts(checkpoint: Path) -> Facts:
    """As rank 0 reads them."""
    return as_on_first_rank(read_facts(checkpoint) if dist.get_rank() == 0 else None)  # type: ignore[return-value]


def _convert(checkpoint: Path, written_by: int) -> Path:
    """Rank 0 has the universal form written; the others wait, and until they see it."""
    target, first = checkpoint.parent / UNIVERSAL / checkpoint.name, dist.get_rank() == 0
    failure = as_on_first_rank(_run_conversion(checkpoint, target, written_by) if first else None)
    if failure is not None:
        raise UserError(failure)
    files = as_on_first_rank(_sizes(target) if first else {})
    if not first and (fault := unseen(target, files)) is not None:
        raise RankError(fault)
    return target


def _sizes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()
    }


def _run_conversion(checkpoint: Path, target: Path, written_by: int) -> str | None:
    """What went wrong, or None."""
    command = [sys.executable, "-m", "train.checkpointing.convert", str(checkpoint), str(target)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    with stop_signals_blocked_in_children():  # this rank stops after the first step
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if not done.returncode:
        return None
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode == BAD_USAGE:
        return last
    return (
        f"{checkpoint} cannot be converted for another number of ranks ({last}); start as many ranks as wrote it, "
        f"{written_by}"
    )
