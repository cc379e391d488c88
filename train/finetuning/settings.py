"""What fine-tuning on one task is made of: defaults of the task < the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from train.errors import UserError
from train.finetuning.tasks import Task

SPAN_ALONE = ("doc_stride", "max_answer_length")


class MayStop(Protocol):
    """train.distributed.signals.StopRequest, or anything else that can be asked."""

    @property
    def requested(self) -> bool: ...

    def when_asked(self, act: Callable[[], None]) -> None: ...


@dataclass(frozen=True)
class Settings:
    """Numbers that the scores depend on; all are written into scores.json."""

    epochs: float
    learning_rate: float
    batch_size: int
    max_length: int
    """Tokens, special ones included; clipped to the model's positions."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the learning rate rises; then it falls linearly to 0."""
    weight_decay: float = 0.01
    group_by_length: bool = True
    """Batches of texts of like length: less padding."""
    max_train_examples: int | None = None
    max_eval_examples: int | None = None
    temperature: float | None = None
    """Of the soft labels; None without a teacher, and for a regression, which has none."""
    hard_weight: float | None = None
    """alpha: share of the loss on the true labels, 1 - alpha on the teacher's; None without a teacher."""
    unlabelled_only: bool | None = None
    doc_stride: int | None = None
    max_answer_length: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Without the fields that this task does not have."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Job:
    """One task for one model: what a runner is prepared from."""

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
    stop: MayStop | None = None
    say: Callable[[str], None] = print


def settings_for(task: Task, options: Mapping[str, Any], teachers: Sequence[str] = ()) -> Settings:
    """The task's defaults, overridden by what the user gave.

    Args:
        options: names of Settings -> value; None where the user said nothing.
    Raises:
        UserError: a value that cannot be, or one without effect on this task.
    """
    given = {key: value for key, value in options.items() if value is not None}
    values = {**asdict(task.defaults), **given}
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
    if teachers:
        hard_weight = 0.0 if given.get("unlabelled_only") else 0.5
        values = {"temperature": 2.0, "hard_weight": hard_weight, **values}
    if task.is_regression:
        values["temperature"] = None
    known = {field.name for field in fields(Settings)}
    settings = Settings(**{key: value for key, value in values.items() if key in known})
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    for name in ("epochs", "learning_rate", "batch_size", "max_length", "temperature"):
        _refuse_unless(name, getattr(settings, name), lambda value: value > 0, "a number above 0")
    for name in ("max_train_examples", "max_eval_examples"):
        _refuse_unless(name, getattr(settings, name), lambda value: value >= 1, "at least 1")
    _refuse_unless("weight_decay", settings.weight_decay, lambda value: value >= 0, "0 or more")
    for name in ("warmup_ratio", "hard_weight"):
        _refuse_unless(name, getattr(settings, name), lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _refuse_unless(name: str, value: Any, good: Callable[[Any], bool], wanted: str) -> None:
    if value is not None and not (math.isfinite(value) and good(value)):
        raise UserError(f"--{name.replace('_', '-')} is {value}; give {wanted}")
