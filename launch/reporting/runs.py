"""What a finished run says of itself: size, tokens, time, machines, loss curves. Reads text files alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.loop.metrics import read_rows
from train.run_folder import read_summary

Point = tuple[float, float]


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
    """Of training steps; evaluation, checkpoints and the start not counted."""
    num_processes: int
    device: str
    """"GPU", "CPU", or "device not recorded"."""
    global_batch_size: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def process_hours(self) -> float:
        """GPU-hours where a process has a GPU to itself."""
        return self.seconds * self.num_processes / 3600


@dataclass(frozen=True)
class Curve:
    """A run's losses over its tokens."""

    name: str
    heldout: Sequence[Point]
    """(tokens, nats per masked token)."""
    training: Sequence[Point]
    teacher_loss: float | None


def read_run_facts(run_dir: Path) -> RunFacts:
    """UserError, naming the run, where it is not finished."""
    summary = read_summary(run_dir)
    if summary is None:
        raise UserError(f"{run_dir} is not finished: it holds no summary.json yet; run it to its end")
    engine = json.loads((run_dir / "ds_config.json").read_text())
    per_step = engine["train_micro_batch_size_per_gpu"] * engine["gradient_accumulation_steps"]
    return RunFacts(
        name=run_dir.name,
        student_parameters=summary["parameters"]["student"],
        teacher_parameters=summary["parameters"].get("teacher"),
        steps=summary["steps"],
        tokens=summary["tokens"],
        seconds=training_seconds(read_rows(run_dir)),
        num_processes=max(1, engine["train_batch_size"] // per_step),
        device=device_of(summary, engine),
        global_batch_size=engine["train_batch_size"],
    )


def training_seconds(rows: Sequence[dict[str, Any]]) -> float:
    """Seconds that the steps took, from each row's tokens and speed."""
    seconds, before = 0.0, 0
    for row in rows:
        if row.get("tokens_per_s"):
            seconds += (row["tokens"] - before) / row["tokens_per_s"]
            before = row["tokens"]
    return seconds


def device_of(summary: dict[str, Any], engine: dict[str, Any]) -> str:
    """Where a run computed: as its summary says; else fp16 or bf16 means a GPU, and a CPU build of torch a CPU."""
    if "device" in summary:
        return "GPU" if str(summary["device"]).startswith("cuda") else "CPU"
    if any(engine.get(kind, {}).get("enabled") for kind in ("fp16", "bf16")):
        return "GPU"
    return "CPU" if "+cpu" in summary["versions"]["torch"] else "device not recorded"


def read_curve(run_dir: Path) -> Curve:
    """Losses that are numbers; a row whose loss overflowed has no point."""
    rows = read_rows(run_dir)
    tokens_at = {row["step"]: row["tokens"] for row in rows if "tokens" in row} | {0: 0}
    heldout = [
        (float(tokens_at[row["step"]]), row["heldout_mlm_loss"])
        for row in rows
        if _finite(row.get("heldout_mlm_loss")) and row["step"] in tokens_at
    ]
    training = [(float(row["tokens"]), row["loss_mlm"]) for row in rows if _finite(row.get("loss_mlm"))]
    teacher = [row["teacher_heldout_mlm_loss"] for row in rows if "teacher_heldout_mlm_loss" in row]
    return Curve(run_dir.name, heldout, training, teacher[0] if teacher else None)


def teacher_loss(curves: Sequence[Curve]) -> float | None:
    """Held-out MLM loss of the teacher that a report names: that of the first run which has one."""
    return next((curve.teacher_loss for curve in curves if curve.teacher_loss is not None), None)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
