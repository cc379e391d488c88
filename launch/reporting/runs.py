"""What a finished run says of itself: size, tokens, time, machines. Reads text files alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.loop.metrics import read_rows
from train.run_folder import read_summary


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
