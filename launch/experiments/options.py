"""What the commands that train and score many models share: where they run, which tasks, whose flags."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from launch import finetune
from launch.experiments.job import Job
from launch.stages import RANKS, cpu_environment, deepspeed_words
from train.distributed.device import kind_here, unused_gpus
from train.errors import UserError

FINETUNE = "--finetune."
_ONE_TASK = re.compile(r"--(?P<task>[^.=]+)\.(?P<flag>.*)")
FINETUNING_SEEDS = 5


def add_where(parser: argparse.ArgumentParser) -> None:
    """--ranks or --hostfile."""
    where = parser.add_mutually_exclusive_group()
    ranks_help = f"ranks on this machine; default: one for each GPU, or {RANKS} on the CPU"
    where.add_argument("--ranks", type=int, metavar="N", help=ranks_help)
    where.add_argument("--hostfile", type=Path, help="train on these hosts, as with `deepspeed --hostfile`")


def check_where(options: argparse.Namespace) -> None:
    """UserError where ranks or hosts cannot be."""
    if options.ranks is not None and options.ranks < 1:
        raise UserError(f"--ranks {options.ranks}: give at least 1")
    if options.hostfile is not None and not options.hostfile.is_file():
        raise UserError(f"--hostfile {options.hostfile}: no such file")


def split_words(words: Sequence[str], recipes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags for launch/pretrain.py, and those for launch/finetune.py: of --finetune.KEY=VALUE --KEY=VALUE, for every
    task; of --finetune.TASK.KEY=VALUE --TASK.KEY=VALUE.

    Args:
        recipes: files of --config, which come first.
    Raises:
        UserError: --run.dir, which each run has of its own.
    """
    own = [f"--{word.removeprefix(FINETUNE)}" for word in words if word.startswith(FINETUNE)]
    words = [word for word in words if not word.startswith(FINETUNE)]
    if any(word.startswith("--run.dir") for word in words):
        raise UserError("--run.dir has no effect here: every run has its folder below --out; remove it")
    return [*(flag for recipe in recipes for flag in ("--config", recipe)), *words], own


def job_for(
    options: argparse.Namespace, words: list[str], finetuning: Mapping[str, list[str]], seeds: int
) -> Job:
    """Where and how the runs start; a GPU that lies idle is said.

    Args:
        finetuning, seeds: of the scores; empty without them.
    """
    on_cpu = options.hostfile is None and kind_here() == "cpu"
    if on_cpu and (remark := unused_gpus(os.environ, "cpu")):
        print(f"warning: {remark}", file=sys.stderr, flush=True)
    ranks = RANKS if options.ranks is None and on_cpu else options.ranks
    return Job(
        out=options.out,
        words=words,
        launcher=lambda: deepspeed_words(ranks, options.hostfile),
        environment=cpu_environment() if on_cpu else dict(os.environ),
        finetuning=finetuning,
        finetuning_seeds=seeds,
    )


def checked_finetuning(
    names: Sequence[str], flags: Sequence[str], own: Sequence[str], stand_in: str
) -> tuple[dict[str, list[str]], dict[str, dict[str, Any]]]:
    """launch/finetune.py's flags for every model, and its settings, by task.

    Args:
        names: of the tasks, or glue.
        own: what the user gave, as split_words leaves it.
        stand_in: a model whose check stands for that of the students, which are not there yet: the teacher.
    Raises:
        UserError: what would otherwise only be found wrong after hours of training.
    """
    parser = finetune.parser()
    parser.error = _refuse_flag  # type: ignore[method-assign]
    always = [*flags, *(word for word in own if not _ONE_TASK.match(word))]
    end = ["--task", *names, "--model", stand_in, "--out", "scores"]
    parsed = parser.parse_args([*always, *end])
    tasks = finetune.tasks_of(names, finetune.own_options(parsed))
    words = {task.name: list(always) for task in tasks}
    for match in filter(None, map(_ONE_TASK.match, own)):
        if match["task"] not in words:
            raise UserError(
                f"{FINETUNE}{match[0].removeprefix('--')} has no effect: {match['task']} is not among the tasks "
                f"that are scored, {', '.join(words)}"
            )
        words[match["task"]].append(f"--{match['flag']}")
    jobs = [finetune.job_of(task, parser.parse_args([*words[task.name], *end])) for task in tasks]
    kept = finetune.jobs_with_data(jobs, names)
    return (
        {job.task.name: words[job.task.name] for job in kept},
        {job.task.name: job.settings.as_json() for job in kept},
    )


def _refuse_flag(message: str) -> NoReturn:
    raise UserError(f"{FINETUNE}KEY=VALUE, which becomes --KEY=VALUE of launch/finetune.py: {message}")


def names_in(text: str) -> list[str]:
    """The names in "a,b"; UserError where there is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"{text!r} names nothing: give names with commas between them")
    return names
