"""A run that diverged: which of its batches were bad, and the way back without them (run.rollback_on_divergence).

A run goes back to its newest whole checkpoint and passes over the bad steps: they make no update and no row, and their
batches are never used. Every other step keeps its batch, masks, dropout and learning rate, so that the data order is
the recipe's with holes. RUN/rollbacks.json holds what is left out before training goes on, and checkpoints hold it too:
a run that is killed after a rollback ends bit for bit as one that is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
import torch.distributed as dist

from data_prep.shard_format.checks import first_problem
from data_prep.shard_format.files import read_json, write_json
from train.errors import NonFiniteError, UserError
from train.loop.trainer import Trainer

FILE = "rollbacks.json"
SHOWN = 8


class DivergedError(NonFiniteError):
    """Losses, gradients or weights stopped being numbers; every rank raises it after the same step."""

    def __init__(self, message: str, bad_steps: Sequence[int], done: int) -> None:
        super().__init__(message)
        self.bad_steps = tuple(bad_steps)
        """Counted from 0, as in inspect_batch."""
        self.done = done
        """Steps done when it was noticed."""


@dataclass(frozen=True)
class Rollback:
    """One entry of RUN/rollbacks.json."""

    diverged_after_step: int
    continued_from_step: int
    left_out: tuple[int, ...]
    """Steps, counted from 0, whose batches are not used."""
    reason: str


def bad_steps(skipped: Sequence[int], first: int, done: int, weights_finite: bool, fp16: bool) -> list[int]:
    """The steps to leave out after a divergence.

    Those whose update the engine skipped, since their gradients were no numbers; in fp16, where a step is skipped now
    and then to lower the loss scale, those of the last unbroken row. Where weights are no numbers, an update that was
    made broke them: that of the step before the first skipped one, or the last.

    Args:
        skipped: steps that the engine skipped, ascending.
        first: the step that the last checkpoint goes on with; none before it is bad.
        done: one past the last step that was made.
    """
    found = [step for step in skipped if step >= first]
    if fp16 or not weights_finite:
        found = _last_row(found)
    if not weights_finite:
        before = found[0] - 1 if found else done - 1
        found = [before] if before >= first else found[:1]
    return found or [max(first, done - 1)]


def _last_row(steps: Sequence[int]) -> list[int]:
    """The consecutive numbers at the end of an ascending list."""
    row: list[int] = []
    for step in reversed(steps):
        if row and step != row[0] - 1:
            break
        row.insert(0, step)
    return row


def diverged(
    error: NonFiniteError, trainer: Trainer, skipped: Sequence[int], first: int, done: int
) -> DivergedError:
    """The error with its batches in the message; every rank calls this. The last three arguments as in `bad_steps`."""
    finite = torch.tensor(float(weights_are_finite(trainer.engine)), device=trainer.engine.device)
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    bad = bad_steps(skipped, first, done, bool(finite), trainer.engine.fp16_enabled())
    ids = trainer.data.window_ids(bad[-1]).tolist()
    return DivergedError(
        f"{error}. Bad batch{'es' if bad[1:] else ''}: of step {_shortened(bad)}; the last has the sequences "
        f"{_shortened(ids)}: see them with launch/inspect_batch.py --config RUN/config.yaml --step {bad[-1]}",
        bad,
        done,
    )


def weights_are_finite(engine: Any) -> bool:
    """Whether all parameters of an engine's module are numbers; waits for the device."""
    sums = [parameter.detach().double().sum() for parameter in engine.module.parameters()]
    return bool(torch.isfinite(torch.stack(sums)).all())


def _shortened(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN]))
    return shown + (f" and {len(numbers) - SHOWN:,} more" if len(numbers) > SHOWN else "")


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """What RUN/rollbacks.json holds, oldest first; UserError where it is damaged."""
    path = run_dir / FILE
    if not path.exists():
        return []
    remedy = "restore it, or give another run.dir"
    try:
        found = pydantic.TypeAdapter(list[Rollback]).validate_python(read_json(path, remedy).get("rollbacks"))
    except pydantic.ValidationError as error:
        raise UserError(f"{path} is damaged ({first_problem(error)}); {remedy}") from None
    for number, each in enumerate(found):
        for step in each.left_out:
            if not 0 <= each.continued_from_step <= step <= each.diverged_after_step:
                raise UserError(
                    f"{path} is damaged ({number}.left_out: step {step} lies outside of {each.continued_from_step} to "
                    f"{each.diverged_after_step}); {remedy}"
                )
    return found


def write_rollbacks(run_dir: Path, rollbacks: Sequence[Rollback]) -> None:
    """Replace RUN/rollbacks.json."""
    write_json(run_dir / FILE, {"rollbacks": [asdict(each) for each in rollbacks]})


def all_left_out(rollbacks: Sequence[Rollback], in_checkpoint: Sequence[int]) -> tuple[int, ...]:
    """Every step that is left out, ascending."""
    return tuple(sorted({*in_checkpoint, *(step for each in rollbacks for step in each.left_out)}))


def disable_min_scale_error(engine: Any) -> None:
    """DeepSpeed raises an exception of its own where a step overflows at the smallest loss scale.
    run.stop_after_non_finite says when it is enough, with the sequences and the remedy. A checkpoint brings its loss
    scaler along: to be called after each loading."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False
