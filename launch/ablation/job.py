"""The stages of launch/ablate.py: every variant trained, every student fine-tuned, what failed remembered."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli import parse_config
from launch.stages import ROOT, run_stage
from train.config import Config
from train.distributed.signals import STOPPED_AFTER_SAVING

if TYPE_CHECKING:
    from launch.ablation.variants import Variant


class StoppedError(Exception):
    """A stage was stopped by a signal after saving."""


@dataclass
class Job:
    """What is to be done, and what became of it so far."""

    out: Path
    words: list[str]
    """Flags of launch/pretrain.py for every variant."""
    base: Config
    variants: list[Variant]
    left_out: dict[str, str]
    launcher: Callable[[], list[str]]
    environment: dict[str, str]
    finetuning: list[str]
    """Flags of launch/finetune.py for every variant; empty without --tasks."""
    tasks: list[str]
    finetuning_seeds: int
    failed: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    """Of the stages of this call."""

    def config_of(self, variant: Variant) -> Config:
        """Its configuration, through the same parser as launch/pretrain.py's."""
        return parse_config([*self.words, *variant.words, f"--run.dir={self.out / variant.name}"], "")


def train(job: Job) -> None:
    """Every variant that is not finished yet, the full recipe first; nothing further where that has failed.

    Raises:
        StoppedError: a signal came.
    """
    from launch.ablation.runs import is_finished
    from launch.ablation.variants import FULL

    open_ones = [variant for variant in job.variants if not is_finished(job.out / variant.name)]
    for number, variant in enumerate(job.variants, start=1):
        heading = f"[{number}/{len(job.variants)}] {variant.name}: {variant.title} ({_change(variant)})"
        if variant not in open_ones:
            print(f"{heading} - done before", flush=True)
            continue
        print(heading + _time_left(job.seconds, len(open_ones)), flush=True)
        words = [str(ROOT / "launch" / "pretrain.py"), *job.words, *variant.words]
        run_dir = job.out / variant.name
        with _timed(job):
            code = run_stage([*job.launcher(), *words, f"--run.dir={run_dir}"], job.environment)
        open_ones.remove(variant)
        if code == STOPPED_AFTER_SAVING:
            raise StoppedError
        if code or not is_finished(run_dir):
            job.failed[variant.name] = reason_of(code)
            print(f"{variant.name} FAILED: {reason_of(code)}", file=sys.stderr, flush=True)
            if variant.name == FULL:
                return


def finetune_all(job: Job) -> None:
    """Every finished student on the tasks; launch/finetune.py skips what it has scored before.

    Raises:
        StoppedError: a signal came.
    """
    job.seconds.clear()
    todo = [variant for variant in job.variants if variant.name not in job.failed]
    for number, variant in enumerate(todo, start=1):
        left = _time_left(job.seconds, len(todo) - number + 1)
        print(f"[scores {number}/{len(todo)}] {variant.name}: {', '.join(job.tasks)}{left}", flush=True)
        run_dir = job.out / variant.name
        command = [sys.executable, str(ROOT / "launch" / "finetune.py"), *job.finetuning]
        command += ["--model", str(run_dir / "student"), "--out", str(run_dir / "scores")]
        with _timed(job):
            code = run_stage(command, job.environment)
        if code == STOPPED_AFTER_SAVING:
            raise StoppedError
        if code:
            job.failed[variant.name] = f"fine-tuning: {reason_of(code)}"
            print(f"{variant.name} FAILED: fine-tuning: {reason_of(code)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _timed(job: Job) -> Iterator[None]:
    start = time.monotonic()
    yield
    job.seconds.append(time.monotonic() - start)


def _change(variant: Variant) -> str:
    return variant.changed if variant.changes else "nothing changed"


def _time_left(seconds: Sequence[float], stages: int) -> str:
    """From the stages of this call; nothing before the first has ended."""
    if not seconds:
        return ""
    from tqdm import tqdm

    return f"  about {tqdm.format_interval(sum(seconds) / len(seconds) * stages)} left for all"


def reason_of(code: int) -> str:
    """Why a stage left nothing to compare, from its exit code."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}, see above" if code else "it ended without a student"
