"""Where a SQuAD task's questions come from: a folder with the official files, or the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.errors import UserError
from train.finetuning.hub import hub_name, load_hub
from train.finetuning.readers import data_folder
from train.finetuning.settings import Job
from train.finetuning.squad.questions import (
    Question,
    from_columns,
    has_unanswerable,
    named,
    read_squad,
    trainable,
)
from train.finetuning.tasks import Task

VERSIONS = {"squad": "v1.1", "squad_v2": "v2.0"}
SPLITS = {"train": ("train",), "dev": ("dev", "validation")}


def find_squad_files(task: Task, data: str) -> dict[str, Path]:
    """ "train" and "dev" -> the task's files in `data`, which is their folder or the one of all tasks.

    train-v1.1.json, dev-v2.0.json and so on; or train.json and dev.json (validation.json); each plain or .gz.

    Raises:
        FileNotFoundError: they are not there, with what was looked for.
        UserError: `data` is a file.
    """
    folder = data_folder(data)
    names = {
        split: [f"{stem}{version}.json{ending}" for version in (f"-{VERSIONS[task.name]}", "") for stem in stems
                for ending in ("", ".gz")]
        for split, stems in SPLITS.items()
    }  # fmt: skip
    for place in (folder, *(folder / name for name in task.folders)):
        found = {
            split: next((place / name for name in options if (place / name).is_file()), None)
            for split, options in names.items()
        }
        if any(found.values()):
            for split, path in found.items():
                if path is None:
                    raise FileNotFoundError(
                        f"{place} has no {split} set of {task.title}: {' or '.join(names[split])}"
                    )
            return {split: path for split, path in found.items() if path is not None}
    raise FileNotFoundError(
        f"no questions of {task.title} in {data}: looked for {names['train'][0]} and {names['dev'][0]}, there and in "
        f"{', '.join(task.folders)}"
    )


def read_questions(job: Job) -> tuple[list[Question], list[Question]]:
    """(train, dev) of the job's task, as many as its settings say; what is left out is said.

    Raises:
        UserError, OSError: see squad_data.py; questions without an answer in SQuAD 1.1, or none such in 2.0.
    """
    hub = hub_name(job.task, job.data)
    if hub is None:
        assert job.data is not None
        files = find_squad_files(job.task, job.data)
        sources = {split: str(path) for split, path in files.items()}
        read = {split: read_squad(path) for split, path in files.items()}
    else:
        name, config = hub
        splits = load_hub(name, config)
        found = {
            split: next((own for own in names if own in splits), None) for split, names in SPLITS.items()
        }
        for split, own in found.items():
            if own is None:
                raise UserError(
                    f"the dataset {name} has no split {' or '.join(SPLITS[split])}; it has {', '.join(splits)}"
                )
        sources = {split: f"{name}, split {own}" for split, own in found.items()}
        read = {split: from_columns(splits[own], sources[split]) for split, own in found.items()}
    _check_version(job.task, read, sources)
    train, misplaced = trainable(read["train"], sources["train"])
    if misplaced:
        job.say(
            f"{job.task.name}: {len(misplaced)} of {len(read['train']):,} training questions are left out, their "
            f"answers do not stand where answer_start says: {named(misplaced)}"
        )
    return sample(train, job.settings.max_train_examples), sample(read["dev"], job.settings.max_eval_examples)


def sample(questions: Sequence[Question], count: int | None) -> list[Question]:
    """`count` of them, always the same ones, in their order; all where there are no more."""
    if count is None or count >= len(questions):
        return list(questions)
    chosen = np.sort(np.random.default_rng(0).permutation(len(questions))[:count])
    return [questions[index] for index in chosen]


def questions_digest(questions: Sequence[Question]) -> str:
    """SHA-256 over everything that is known of the questions."""
    digest = hashlib.sha256()
    for question in questions:
        fields = (question.id, question.question, question.context, question.answers, question.starts)
        digest.update(json.dumps(fields).encode())
    return digest.hexdigest()


def _check_version(task: Task, read: dict[str, list[Question]], sources: dict[str, str]) -> None:
    two = {split: has_unanswerable(questions) for split, questions in read.items()}
    if task.name == "squad":
        for split, found in two.items():
            if found:
                first = next(question.id for question in read[split] if not question.answers)
                raise UserError(
                    f"{sources[split]}: question {first} has no answer, as in SQuAD 2.0; give --task squad_v2"
                )
    elif not any(two.values()):
        raise UserError(
            f"{sources['dev']}: every question has an answer, as in SQuAD 1.1; give --task squad, or the files of 2.0"
        )
