"""The stages of launch/ablate.py: every variant trained, every student fine-tuned, the results compared."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data_prep.shard_format.files import write_json, write_text
from launch.ablation.figure import plot
from launch.ablation.runs import is_finished, results_of, scale_of, teacher_scores
from launch.ablation.table import Ablation, as_json, as_markdown, as_text
from launch.ablation.variants import FULL, Variant
from launch.cli import parse_config
from launch.stages import ROOT, run_stage
from launch.tables import text_table
from train.config import Config
from train.distributed.signals import STOPPED_AFTER_SAVING
from train.errors import BAD_USAGE
from train.evaluation.masking import evaluation_label
from train.run_folder import final_model, provenance


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

    def fail(self, variant: Variant, reason: str) -> None:
        """Remember a variant that has no result, and say so."""
        self.failed[variant.name] = reason
        print(f"{variant.name} FAILED: {reason}", file=sys.stderr, flush=True)


def listed(job: Job) -> str:
    """What would be trained, and what is left out."""
    rows = [(variant.name, variant.changed.replace(" ", "\n"), variant.title) for variant in job.variants]
    lines = [text_table(("variant", "changes", "what it is"), rows, right=False)]
    return "\n".join([*lines, *(f"left out: {name}: {reason}" for name, reason in job.left_out.items())])


def run(job: Job) -> int:
    """Train, fine-tune, compare; the exit code.

    Raises:
        StoppedError: a signal came.
    """
    train(job)
    if FULL in job.failed:
        print("without the full recipe there is nothing to compare with", file=sys.stderr)
        return BAD_USAGE if job.failed[FULL] == reason_of(BAD_USAGE) else 1
    if job.tasks:
        compare(job)  # what is known is worth keeping before the hours of fine-tuning
        finetune_all(job)
    print("\n" + compare(job))
    print(f"\nfigure:  {job.out / 'ablation.png'}\ntable:   {job.out / 'ablation.md'}")
    print(f"figures: {job.out / 'ablation.json'}", flush=True)
    for name, reason in job.failed.items():
        print(f"FAILED: {name} ({reason})", file=sys.stderr)
    return 1 if job.failed else 0


def compare(job: Job) -> str:
    """Write ablation.json, .md and .png of what is finished; the table for the screen."""
    finished = [variant for variant in job.variants if is_finished(job.out / variant.name)]
    masking = evaluation_label(job.base.data.sequence_length)
    ablation = Ablation(
        results=results_of(job.out, finished, job.base, job.tasks),
        scale=scale_of(job.out / FULL),
        masking=masking,
        teacher=teacher_scores(job.out / FULL, masking),
        finetuning_seeds=job.finetuning_seeds if job.tasks else 0,
        failed=job.failed,
        left_out=job.left_out,
    )
    write_json(job.out / "ablation.json", {**as_json(ablation), "versions": provenance()})
    write_text(job.out / "ablation.md", as_markdown(ablation))
    plot(ablation, job.out / "ablation.png")
    return as_text(ablation)


def train(job: Job) -> None:
    """Every variant that is not finished yet, the full recipe first; nothing further where that has failed.

    Raises:
        StoppedError: a signal came.
    """
    num_open = sum(not is_finished(job.out / variant.name) for variant in job.variants)
    for number, variant in enumerate(job.variants, start=1):
        run_dir, changed = job.out / variant.name, variant.changed if variant.changes else "nothing changed"
        heading = f"[{number}/{len(job.variants)}] {variant.name}: {variant.title} ({changed})"
        if is_finished(run_dir):
            print(f"{heading} - done before", flush=True)
            continue
        print(heading + _time_left(job.seconds, num_open), flush=True)
        num_open -= 1
        words = [str(ROOT / "launch" / "pretrain.py"), *job.words, *variant.words, f"--run.dir={run_dir}"]
        code = _run(job, [*job.launcher(), *words])
        if code or not is_finished(run_dir):
            job.fail(variant, reason_of(code))
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
        code = _run(job, [*command, "--model", str(final_model(run_dir)), "--out", str(run_dir / "scores")])
        if code:
            job.fail(variant, f"fine-tuning: {reason_of(code)}")


def _run(job: Job, command: Sequence[str]) -> int:
    start = time.monotonic()
    code = run_stage(command, job.environment)
    job.seconds.append(time.monotonic() - start)
    if code == STOPPED_AFTER_SAVING:
        raise StoppedError
    return code


def _time_left(seconds: Sequence[float], stages: int) -> str:
    """From the stages of this call; nothing before the first has ended."""
    if not seconds:
        return ""
    return f"  about {tqdm.format_interval(sum(seconds) / len(seconds) * stages)} left for all"


def reason_of(code: int) -> str:
    """Why a stage left nothing to compare, from its exit code."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}, see above" if code else "it ended without a student"
