"""The runs of an experiment, one after another: what is finished is skipped, what was interrupted goes on."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from launch.common.cli import parse_config
from launch.common.stages import ROOT, run_stage
from launch.experiments.run_folders import is_finished
from launch.experiments.variant import Variant
from train.config import Config
from train.distributed.signals import STOPPED_AFTER_SAVING
from train.errors import UserError


class StoppedError(Exception):
    """A stage was stopped by a signal after saving."""


@dataclass(frozen=True)
class Finetuning:
    """How every model is fine-tuned on one task."""

    task: str
    """As launch/finetune.py's --task has it: sst2, csv:FILE."""
    flags: tuple[str, ...]


@dataclass
class Job:
    """How runs are started, and what became of them so far."""

    out: Path
    words: list[str]
    """Flags of launch/pretrain.py for every run."""
    launcher: Callable[[], list[str]]
    environment: dict[str, str]
    finetuning: Mapping[str, Finetuning]
    """By the task's name; empty where nothing is scored."""
    finetuning_seeds: int
    failed: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    """Of the stages of this call."""

    def config_of(self, variant: Variant) -> Config:
        """Its configuration, through the same parser as launch/pretrain.py's; UserError naming the run."""
        try:
            return parse_config(self._words(variant), "")
        except UserError as error:
            raise UserError(f"{variant.name}: {error}") from None

    def _words(self, variant: Variant) -> list[str]:
        """The flags of launch/pretrain.py."""
        return [*self.words, *variant.words, f"--run.dir={self.out / variant.name}"]

    def fail(self, name: str, reason: str) -> None:
        """Remember a run that has no result, and say so."""
        self.failed[name] = reason
        print(f"{name} FAILED: {reason}", file=sys.stderr, flush=True)

    def train(self, variants: Sequence[Variant]) -> None:
        """Every run that is not finished yet; nothing further where a required one has failed.

        Raises:
            StoppedError: a signal came.
        """
        num_open = sum(not is_finished(self.out / variant.name) for variant in variants)
        for number, variant in enumerate(variants, start=1):
            run_dir = self.out / variant.name
            changed = variant.changed if variant.changes else "nothing changed"
            heading = f"[{number}/{len(variants)}] {variant.name}: {variant.title} ({changed})"
            if is_finished(run_dir):
                print(f"{heading} - done before", flush=True)
                continue
            print(heading + self._time_left(num_open), flush=True)
            num_open -= 1
            script = str(ROOT / "launch" / "pretrain.py")
            code = self._run([*self.launcher(), script, *self._words(variant)])
            if code or not is_finished(run_dir):
                self.fail(variant.name, reason_of(code))
                if variant.is_required:
                    return

    def finetune(self, models: Mapping[str, str], tasks: Sequence[str] = ()) -> None:
        """Every model on the tasks; launch/finetune.py skips what it has scored before.

        Args:
            models: folder or hub name, by the name of its folder in `out`.
            tasks: some of the tasks; empty for all.
        Raises:
            StoppedError: a signal came.
        """
        self.seconds.clear()
        script = [sys.executable, str(ROOT / "launch" / "finetune.py")]
        by_flags: dict[tuple[str, ...], list[str]] = {}
        for each in map(self.finetuning.__getitem__, tasks or self.finetuning):
            by_flags.setdefault(each.flags, []).append(each.task)
        stages = [(name, flags) for name in models for flags in by_flags]
        for number, (name, flags) in enumerate(stages, start=1):
            left = self._time_left(len(stages) - number + 1)
            print(f"[scores {number}/{len(stages)}] {name}: {', '.join(by_flags[flags])}{left}", flush=True)
            where = ["--model", models[name], "--out", str(self.out / name / "scores")]
            code = self._run([*script, *flags, "--task", *by_flags[flags], *where])
            if code:
                self.fail(name, f"fine-tuning: {reason_of(code)}")

    def _run(self, command: Sequence[str]) -> int:
        start = time.monotonic()
        code = run_stage(command, self.environment)
        self.seconds.append(time.monotonic() - start)
        if code == STOPPED_AFTER_SAVING:
            raise StoppedError
        return code

    def _time_left(self, stages: int) -> str:
        """From the stages of this call; nothing before the first has ended."""
        if not self.seconds:
            return ""
        return f"  about {tqdm.format_interval(sum(self.seconds) / len(self.seconds) * stages)} left for all"


def reason_of(code: int) -> str:
    """Why a stage left nothing to compare, from its exit code."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}, see above" if code else "it ended without a model"
