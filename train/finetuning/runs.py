"""One task, several seeds: what is finished is skipped, what was killed goes on, what differs is refused.

OUT/TASK/options.json       what the scores depend on; another start with other options is refused by name
OUT/TASK/seed-N/            model folder and scores.json of a finished seed; appears whole or not at all
OUT/TASK/.seed-N/           a seed in progress: transformers' checkpoints
OUT/TASK/scores.json        train/finetuning/results.py
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.shard_format.files import new_folder, read_json, write_json
from train.errors import UserError
from train.finetuning import classification, tagging
from train.finetuning.data.own import describe
from train.finetuning.results import FILE, read_scores, read_seed_scores, write_scores
from train.finetuning.settings import Job
from train.finetuning.soft_labels import weights_digest
from train.finetuning.squad import training as squad
from train.finetuning.task_runner import TaskRunner
from train.finetuning.training import Stopped
from train.run_folder import flatten, hold

OPTIONS = "options.json"


def check_task(job: Job) -> None:
    """UserError for what can be refused cheaply, before hours are spent on other tasks: data and models."""
    if job.task.kind == "span":
        squad.check(job)
    elif job.task.kind == "tokens":
        tagging.check(job)
    else:
        classification.check(job)


def prepare(job: Job) -> TaskRunner:
    """Read and encode the data, ask the teachers: once for all seeds."""
    if job.task.kind == "span":
        return squad.SpanRunner(job)
    if job.task.kind == "tokens":
        return tagging.Tagging(job)
    return classification.Classification(job)


def run_task(job: Job, seeds: Sequence[int]) -> dict[str, Any]:
    """Fine-tune on one task with every seed, or as many as are still to do.

    Returns:
        The contents of scores.json.
    Raises:
        UserError, OSError: bad input, or a folder of another run.
        train.finetuning.training.Stopped: a signal came; a checkpoint was left.
    """
    with hold(job.folder) as stopping:
        if job.stop is not None:
            job.stop.when_asked(stopping)
        options = _options(job)
        contents = {"model": weights_digest(job.model)}
        contents |= {f"teacher {teacher}": weights_digest(teacher) for teacher in job.teachers}
        _refuse_changes(job.folder, {**options, "contents": contents})
        done = finished_seeds(job.folder)
        before = read_scores(job.folder)
        if before and all(str(seed) in before["seeds"] for seed in seeds):
            job.say(f"{job.task.name}: {_seeds(seeds)} finished before")
            return before
        runner = prepare(job)
        options["contents"] = {**runner.fingerprints, **contents}
        _refuse_changes(job.folder, options)
        write_json(job.folder / OPTIONS, options)
        scores = None
        for seed in seeds:
            if seed in done:
                job.say(f"{job.task.name} seed {seed}: finished before")
            elif job.stop is not None and job.stop.requested:
                raise Stopped(f"{job.task.name}: stopped before seed {seed}")
            else:
                done[seed] = _run_seed(job, runner, seed)
                scores = write_scores(job.folder, _description(job, runner), done)
        return scores or write_scores(job.folder, _description(job, runner), done)


def finished_seeds(folder: Path) -> dict[int, dict[str, float]]:
    """Seed -> its scores, for the seeds that are finished."""
    found = {}
    for path in folder.glob(f"seed-*/{FILE}"):
        if number := re.fullmatch(r"seed-(\d+)", path.parent.name):
            found[int(number[1])] = read_seed_scores(path.parent)
    return dict(sorted(found.items()))


def _run_seed(job: Job, runner: TaskRunner, seed: int) -> dict[str, float]:
    work = job.folder / f".seed-{seed}"
    work.mkdir(exist_ok=True)
    with new_folder(job.folder / f"seed-{seed}") as out:
        found = runner.run_seed(seed, work, out)
        scores = {name: round(value, 4) for name, value in found.items()}
        write_json(out / FILE, scores)
    shutil.rmtree(work, ignore_errors=True)
    metrics = ", ".join(f"{name} {scores[name]:.1f}" for name in runner.metrics)
    job.say(
        f"{job.task.name} seed {seed}: {metrics}; score {scores['score']:.1f}; {scores['seconds']:.0f} s, "
        f"{scores['examples_per_s']:,.0f} examples/s"
    )
    return scores


def _description(job: Job, runner: TaskRunner) -> dict[str, Any]:
    """scores.json without its seeds."""
    return {
        "task": job.task.name,
        **_own(job),
        "model": job.model,
        "teacher": list(job.teachers),
        "unlabelled": job.unlabelled,
        "parameters": runner.parameters,
        "settings": job.settings.as_json(),
        "train_examples": runner.train_examples,
        "dev_examples": runner.dev_examples,
        "metrics": list(runner.metrics),
    }


def _options(job: Job) -> dict[str, Any]:
    return {
        "task": job.task.name,
        **_own(job),
        "model": _absolute(job.model),
        "data": _absolute(job.data) if job.data else None,
        "teacher": [_absolute(teacher) for teacher in job.teachers],
        "unlabelled": _absolute(job.unlabelled) if job.unlabelled else None,
        "settings": job.settings.as_json(),
    }


def _own(job: Job) -> dict[str, Any]:
    """What a user's own task is; nothing of one of the table."""
    return {"own": describe(job.task)} if job.task.own is not None else {}


def _absolute(name: str) -> str:
    """The same folder by another name is the same; a hub name stays as it is."""
    return os.path.abspath(name) if os.path.exists(name) else name


def _resolved(option: Any) -> Any:
    """Paths without links: RUN/student is RUN/model."""
    if isinstance(option, list):
        return [_resolved(entry) for entry in option]
    return os.path.realpath(option) if isinstance(option, str) and os.path.isabs(option) else option


def _refuse_changes(folder: Path, options: Mapping[str, Any]) -> None:
    """UserError where the folder was begun with other options; contents that are not known yet are not compared."""
    path = folder / OPTIONS
    if not path.exists():
        return
    before = flatten(read_json(path, f"delete {folder} or give another --out"))
    now = flatten(options)
    compared = [key for key in {**before, **now} if key in now or not key.startswith("contents.")]
    # Folders of before December 2026 do not say these.
    compared = [key for key in compared if key in before or key not in ("own.many", "own.metrics")]
    changes = [
        f"contents of the {key.removeprefix('contents.')} differ"
        if key.startswith("contents.")
        else f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in compared
        if _resolved(before.get(key)) != _resolved(now.get(key))
    ]
    if changes:
        raise UserError(
            f"{folder} was begun with other options:\n  "
            + "\n  ".join(changes)
            + "\ngive another --out, restore what was, or delete the folder"
        )


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
