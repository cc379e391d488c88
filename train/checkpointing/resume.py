"""Which checkpoint a start goes on from, and how it is loaded, also on another number of ranks.

DeepSpeed's own checkpoints hold one partition per rank and load on the same number of ranks alone. For another
number rank 0 converts the checkpoint to DeepSpeed's universal form first, beside the checkpoints, and the copy is
removed once it is loaded. The data order, the masks and dropout do not depend on the number of ranks, so that the
run goes on with the same batches.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from train.checkpointing.checkpoint import newest_checkpoint, read_facts
from train.checkpointing.state import TrainState
from train.errors import UserError, one_line

UNIVERSAL = ".universal"


def choose_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint as rank 0 sees it, on every rank; None where there is none."""
    found = [newest_checkpoint(folder, say) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def needs_conversion(checkpoint: Path | None, world_size: int) -> bool:
    """Whether the checkpoint was written by another number of ranks."""
    return checkpoint is not None and _written_by(checkpoint) != world_size


def load_checkpoint(
    engine: Any, checkpoint: Path | None, world_size: int, say: Callable[[str], None]
) -> TrainState:
    """Load engine and state; every rank calls this.

    Args:
        engine: made with load_universal where `needs_conversion` says so.
        checkpoint: None starts at step 0.
    Raises:
        UserError: DeepSpeed cannot read or convert it.
    """
    if checkpoint is None:
        return TrainState()
    source = checkpoint
    if needs_conversion(checkpoint, world_size):
        say(
            f"continuing from {checkpoint}, written by {_written_by(checkpoint)} ranks; converting it for {world_size}"
        )
        source = _convert(checkpoint)
    else:
        say(f"continuing from {checkpoint}")
    try:
        path, client_state = engine.load_checkpoint(str(source.parent), tag=source.name)
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
    dist.barrier()
    if source != checkpoint and dist.get_rank() == 0:
        shutil.rmtree(source.parent)
    return TrainState.from_dict(client_state["halfling"])


def _written_by(checkpoint: Path) -> int:
    return int(read_facts(checkpoint)["world_size"])


def _convert(checkpoint: Path) -> Path:
    """Rank 0 writes the universal form; the others wait. A process of its own, since it prints a lot."""
    target = checkpoint.parent / UNIVERSAL / checkpoint.name
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        shutil.rmtree(target.parent, ignore_errors=True)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        command += ["--input_folder", str(checkpoint), "--output_folder", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            failure = [(done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]]
    dist.broadcast_object_list(failure)
    if failure[0] is not None:
        raise UserError(
            f"{checkpoint} cannot be converted for another number of ranks ({failure[0]}); start as many ranks as "
            f"wrote it, {_written_by(checkpoint)}"
        )
    return target
