"""What a finished run says of itself: size, tokens, time, machines. Reads text files alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError, field_validator

from data_prep.shard_format.checks import first_problem
from data_prep.shard_format.files import read_json
from train.errors import UserError
from train.loop.metrics import read_rows
from train.run_folder import RESTORE, read_summary, recorded_config

Kind = TypeVar("Kind", bound=BaseModel)


@dataclass(frozen=True)
class RunFacts:
    """One run's own figures."""

    name: str
    student_parameters: int
    teacher_parameters: int | None
    """None for a run without a teacher, and of all its teachers together."""
    steps: int
    tokens: int
    seconds: float
    """Of training steps; evaluation, checkpoints and the start not counted. 0 where the run's rows are gone."""
    num_processes: int
    device: str
    """"GPU", "CPU", or "device not recorded"."""
    global_batch_size: int
    optimizer: str
    """optimizer.name"""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def process_hours(self) -> float:
        """GPU-hours where a process has a GPU to itself."""
        return self.seconds * self.num_processes / 3600


def read_run_facts(run_dir: Path) -> RunFacts:
    """UserError, naming the run, where it is not finished."""
    summary = read_summary(run_dir)
    if summary is None:
        raise UserError(f"{run_dir} is not finished: it holds no summary.json yet; run it to its end")
    engine = read_json(run_dir / "ds_config.json", RESTORE)
    found = _checked(run_dir / "summary.json", summary, _Summary)
    sizes = _checked(run_dir / "ds_config.json", engine, _Sizes)
    per_step = sizes.train_micro_batch_size_per_gpu * sizes.gradient_accumulation_steps
    return RunFacts(
        name=run_dir.name,
        student_parameters=found.parameters["student"],
        teacher_parameters=found.parameters.get("teacher"),
        steps=found.steps,
        tokens=found.tokens,
        seconds=training_seconds(read_rows(run_dir)),
        num_processes=max(1, sizes.train_batch_size // per_step),
        device=device_of(summary, engine),
        global_batch_size=sizes.train_batch_size,
        optimizer=str(recorded_config(run_dir).get("optimizer", {}).get("name", "lamb")),
    )


class _Summary(BaseModel, strict=True):
    """What is taken of summary.json."""

    parameters: dict[str, PositiveInt]
    steps: NonNegativeInt
    tokens: NonNegativeInt
    device: str = ""
    versions: dict[str, str] = {}

    @field_validator("parameters")
    @classmethod
    def _has_student(cls, parameters: dict[str, int]) -> dict[str, int]:
        if "student" not in parameters:
            raise ValueError("there is no 'student'")
        return parameters


class _Precision(BaseModel):
    enabled: bool = False


class _Sizes(BaseModel, strict=True):
    """What is taken of ds_config.json."""

    train_batch_size: PositiveInt
    train_micro_batch_size_per_gpu: PositiveInt
    gradient_accumulation_steps: PositiveInt
    fp16: _Precision = _Precision()
    bf16: _Precision = _Precision()


def _checked(path: Path, content: dict[str, Any], kind: type[Kind]) -> Kind:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({first_problem(error)}); {RESTORE}") from None


def training_seconds(rows: Sequence[dict[str, Any]]) -> float:
    """Seconds that the steps took, from each row's tokens and speed."""
    seconds, before = 0.0, 0
    for row in rows:
        if row.get("tokens_per_s") and row.get("tokens"):
            seconds += (row["tokens"] - before) / row["tokens_per_s"]
            before = row["tokens"]
    return seconds


def device_of(summary: dict[str, Any], engine: dict[str, Any]) -> str:
    """Where a run computed: as its summary says; else fp16 or bf16 means a GPU, and a CPU build of torch a CPU."""
    if "device" in summary:
        return "GPU" if str(summary["device"]).startswith("cuda") else "CPU"
    if any(engine.get(kind, {}).get("enabled") for kind in ("fp16", "bf16")):
        return "GPU"
    return "CPU" if "+cpu" in summary.get("versions", {}).get("torch", "") else "device not recorded"
