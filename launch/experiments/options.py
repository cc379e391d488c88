"""What the commands that train and score many models share: where they run, which tasks, whose flags."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from launch import finetune
from launch.common.stages import RANKS, cpu_environment, deepspeed_words
from launch.experiments.job import Finetuning, Job
from train.distributed.device import kind_here, unused_gpus
from train.errors import UserError
from train.finetuning.data.own import OwnOptions, is_own, own_name

FINETUNE = "--finetune."
_SAID_HERE = {"task", "model", "out", "seeds", "data"}
"""Flags of launch/finetune.py that these commands give themselves."""
_OF_OWN_DATA = {field.name.replace("_", "-") for field in fields(OwnOptions)}
"""Those about a task of one's own, and about no other."""
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
        UserError: --run.dir, which each run has of its own; a value apart from its --finetune.KEY.
    """
    for word, following in itertools.pairwise(words):
        if word.startswith(FINETUNE) and "=" not in word and not following.startswith("--"):
            raise UserError(f"{word} {following}: give {word}={following}")
    own = [f"--{word.removeprefix(FINETUNE)}" for word in words if word.startswith(FINETUNE)]
    words = [word for word in words if not word.startswith(FINETUNE)]
    if any(word.startswith("--run.dir") for word in words):
        raise UserError("--run.dir has no effect here: every run has its folder below --out; remove it")
    return [*(flag for recipe in recipes for flag in ("--config", recipe)), *words], own


def job_for(
    options: argparse.Namespace, words: list[str], finetuning: Mapping[str, Finetuning], seeds: int
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
    names: Sequence[str], flags: Sequence[str], own: Sequence[str], stand_in: str, all_needed: bool = True
) -> tuple[dict[str, Finetuning], dict[str, dict[str, Any]]]:
    """How every model is fine-tuned, and launch/finetune.py's settings, by task.

    Args:
        names: of the tasks, or glue, or csv:FILE and the like.
        flags: of all tasks, as --KEY=VALUE.
        own: what the user gave, as split_words leaves it.
        stand_in: a model whose check stands for that of the students, which are not there yet: the teacher.
        all_needed: whether data that lack one of the tasks are refused; else it is left out aloud.
    Raises:
        UserError: what would otherwise only be found wrong after hours of training.
    """
    parser = finetune.parser()
    parser.error = _refuse_flag  # type: ignore[method-assign]
    for_one = [match for match in map(_ONE_TASK.match, own) if match]
    for_all = [word for word in own if not _ONE_TASK.match(word)]
    for flag in (*for_all, *(match["flag"] for match in for_one)):
        if (name := _name_of(flag)) in _SAID_HERE:
            raise UserError(f"{FINETUNE}{name} has no effect here: this command says it itself; remove it")
    end = ["--model", stand_in, "--out", "scores"]
    finetune.own_options(
        parser.parse_args([*flags, *for_all, "--task", *names, *end])
    )  # of a task of one's own
    words = _words_by_task(names)
    for match in for_one:
        if match["task"] not in words:
            raise UserError(
                f"{FINETUNE}{match[0].removeprefix('--')} has no effect: {match['task']} is not among the tasks "
                f"that are scored, {', '.join(words)}"
            )
    found, jobs = {}, []
    for name, word in words.items():
        left_out = {"data"} if is_own(word) else _OF_OWN_DATA
        shared = [flag for flag in (*flags, *for_all) if _name_of(flag) not in left_out]
        mine = [*shared, *(f"--{match['flag']}" for match in for_one if match["task"] == name)]
        parsed = parser.parse_args([*mine, "--task", word, *end])
        [task] = finetune.tasks_of(parsed.task, finetune.own_options(parsed))
        found[name] = Finetuning(word, tuple(mine))
        jobs.append(finetune.job_of(task, parsed))
    kept = finetune.jobs_with_data(jobs, names if all_needed else [])
    settings = {job.task.name: job.settings.as_json() for job in kept}
    return {name: found[name] for name in settings}, settings


def _words_by_task(names: Sequence[str]) -> dict[str, str]:
    """How --task says each task, by the name that its scores go by."""
    words: dict[str, str] = {}
    for word in names:
        tasks = [own_name(word)] if is_own(word) else [task.name for task in finetune.tasks_of([word])]
        for name in tasks:
            spelled = word if is_own(word) else name
            if words.setdefault(name, spelled) != spelled:
                raise UserError(f"{word}: there is a task named {name} already; rename the file")
    return words


def _name_of(flag: str) -> str:
    """ "max-length" of --max-length=16."""
    return flag.removeprefix("--").partition("=")[0]


def _refuse_flag(message: str) -> NoReturn:
    raise UserError(f"{FINETUNE}KEY=VALUE, which becomes --KEY=VALUE of launch/finetune.py: {message}")


def names_in(text: str) -> list[str]:
    """The names in "a,b"; UserError where there is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"{text!r} names nothing: give names with commas between them")
    return names
