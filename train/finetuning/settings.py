"""What fine-tuning on one task is made of: defaults of the task < the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.distributed.signals import StopRequest
from train.errors import UserError
from train.finetuning.tasks import Settings, Task

SPAN_ALONE = ("doc_stride", "max_answer_length")


@dataclass(frozen=True)
class Job:
    """One task for one model."""

    task: Task
    model: str
    """Folder or hub name, as given."""
    data: str | None
    """Folder, hub:NAME[:CONFIG], or None for the task's own dataset on the hub."""
    settings: Settings
    folder: Path
    """OUT/TASK."""
    teachers: tuple[str, ...] = ()
    unlabelled: str | None = None
    checkpoint_seconds: float = 300.0
    """Between two checkpoints of a seed."""
    stop: StopRequest | None = None
    say: Callable[[str], None] = print
    """Prints a line for the user."""


def settings_for(task: Task, options: Mapping[str, Any], teachers: Sequence[str] = ()) -> Settings:
    """The task's defaults, overridden by what the user gave.

    Args:
        options: names of Settings -> value; None where the user said nothing.
    Raises:
        UserError: a value that cannot be, or one without effect on this task.
    """
    given = {key: value for key, value in options.items() if value is not None}
    for name in SPAN_ALONE:
        if name in given and task.kind != "span":
            raise UserError(f"--{name.replace('_', '-')} has no effect on {task.name}; leave it out")
    for name in ("temperature", "hard_weight", "unlabelled_only"):
        if name in given and not teachers:
            raise UserError(f"--{name.replace('_', '-')} has no effect without --teacher; leave it out")
    if given.get("unlabelled_only") and "hard_weight" in given:
        raise UserError(
            "--hard-weight has no effect with --unlabelled-only: there are no true labels; leave it out"
        )
    of_teachers = {"temperature": 2.0, "hard_weight": 0.0 if given.get("unlabelled_only") else 0.5}
    values = {**asdict(task.defaults), **(of_teachers if teachers else {}), **given}
    if task.is_regression:
        values["temperature"] = None
    return Settings(**values)
