"""SQuAD's questions: the JSON of versions 1.1 and 2.0 as it is distributed (.gz too), or the hub's data sets.

Nothing is guessed about a file that is something else: what is missing is named, with where it should be.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, TypeAdapter, ValidationError, model_validator

from data_prep.shard_format.files import read_file
from train.errors import UserError
from train.finetuning.data.examples import sampled
from train.finetuning.data.readers import data_folder, hub_name, read_splits
from train.finetuning.data.tables import MEND
from train.finetuning.settings import Job
from train.finetuning.tasks import NoTrainingSetError, Task

VERSIONS = {"squad": "v1.1", "squad_v2": "v2.0"}
SPLITS = {"train": ("train",), "dev": ("dev", "validation")}
# Answers that do not stand where the file says are left out of training, aloud, up to this share; a file with more of
# them was written by other rules (offsets in bytes, another text), and is refused.
TOLERATED_MISPLACED = 0.01
NAMED_AT_MOST = 5
GZIP = b"\x1f\x8b"


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Answer(_Strict):
    text: str
    answer_start: int


class _AnswerColumns(_Strict):
    text: list[str]
    answer_start: list[int]


class _Row(_Strict):
    """On the hub."""

    id: str
    question: str
    context: str
    answers: _AnswerColumns


class _Qa(_Strict):
    id: str
    question: str
    answers: list[_Answer]

    @model_validator(mode="before")
    @classmethod
    def _without_plausible_answers(cls, qa: Any) -> Any:
        return {**qa, "answers": []} if isinstance(qa, dict) and qa.get("is_impossible") is True else qa


class _Paragraph(_Strict):
    context: str
    qas: list[_Qa]


class _Article(_Strict):
    paragraphs: list[_Paragraph]


class _File(_Strict):
    data: list[_Article]


@dataclass(frozen=True)
class Question:
    """One question about one context."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    """Empty where the context holds no answer (SQuAD 2.0)."""
    starts: tuple[int, ...]
    """Of each answer, the index of its first character in the context, in code points."""

    @property
    def span(self) -> tuple[int, int] | None:
        """[first, one past the last) character of the first answer that stands where it should; None without one."""
        for text, start in zip(self.answers, self.starts, strict=True):
            if text.strip() and start >= 0 and self.context[start : start + len(text)] == text:
                return start, start + len(text)
        return None


def read_squad(path: Path) -> list[Question]:
    """All questions of a SQuAD JSON file, in its order.

    Raises:
        UserError: not JSON, or not SQuAD's: the message names what is missing and where.
        OSError: the file cannot be read.
    """
    found = []
    for article in _read_json(path, TypeAdapter(_File), "SQuAD").data:
        for paragraph in article.paragraphs:
            for qa in paragraph.qas:
                texts = tuple(answer.text for answer in qa.answers)
                starts = tuple(answer.answer_start for answer in qa.answers)
                found.append(Question(qa.id, qa.question, paragraph.context, texts, starts))
    return _checked(found, str(path))


def from_columns(rows: Any, source: str) -> list[Question]:
    """Questions from rows as the hub's `squad` and `squad_v2` have them: id, question, context, answers {text,
    answer_start}.

    Raises:
        UserError: a column is missing or of another type.
    """
    found = []
    for index, row in enumerate(rows):
        try:
            checked = _Row.model_validate(row)
        except ValidationError as error:
            raise UserError(f"{source}, row {index}: not SQuAD: {_first_fault(error)}") from None
        texts, starts = checked.answers.text, checked.answers.answer_start
        if len(texts) != len(starts):
            raise UserError(
                f"{source}, row {index}: {len(texts)} answers, but {len(starts)} places where they start"
            )
        found.append(Question(checked.id, checked.question, checked.context, tuple(texts), tuple(starts)))
    return _checked(found, source)


def read_predictions(path: Path) -> dict[str, str]:
    """Predictions in the official format, one JSON object of question id: answer."""
    return _read_json(path, TypeAdapter(dict[str, str]), 'predictions, {question id: answer, "" for none}')


def read_null_scores(path: Path) -> dict[str, float]:
    """{question id: how sure the system is that there is no answer}, as evaluate-v2.0.py's --na-prob-file."""
    return _read_json(path, TypeAdapter(dict[str, FiniteFloat]), "null scores, {question id: number}")


def has_unanswerable(questions: Sequence[Question]) -> bool:
    """Whether this is SQuAD 2.0: some question has no answer."""
    return any(not question.answers for question in questions)


def golds_of(questions: Sequence[Question]) -> dict[str, tuple[str, ...]]:
    """Question id -> the texts of its answers."""
    return {question.id: question.answers for question in questions}


def named(ids: Sequence[str]) -> str:
    """A few ids for a message, and how many more there are."""
    more = f" and {len(ids) - NAMED_AT_MOST} more" if len(ids) > NAMED_AT_MOST else ""
    return ", ".join(ids[:NAMED_AT_MOST]) + more


def find_squad_files(task: Task, data: str) -> dict[str, Path]:
    """ "train" and "dev" -> the task's files in `data`, which is their folder or the one of all tasks.

    train-v1.1.json, dev-v2.0.json and so on; or train.json and dev.json (validation.json); each plain or .gz.

    Raises:
        UserError: they are not there, with what was looked for; `data` is no folder.
    """
    folder = data_folder(data)
    names = {
        split: [f"{stem}{version}.json{ending}" for version in (f"-{VERSIONS[task.name]}", "") for stem in stems
                for ending in ("", ".gz")]
        for split, stems in SPLITS.items()
    }  # fmt: skip
    for place in (folder, *(folder / name for name in task.folders)):
        found = {split: path for split, options in names.items() for path in _first_file(place, options)}
        for split in names if found else ():
            if split not in found:
                raise UserError(f"{place} has no {split} set of {task.title}: {' or '.join(names[split])}")
        if found:
            return found
    raise NoTrainingSetError(
        f"no questions of {task.title} in {data}: looked for {names['train'][0]} and {names['dev'][0]}, there and in "
        f"{', '.join(task.folders)}"
    )


def read_questions(job: Job) -> tuple[list[Question], list[Question]]:
    """(train, dev) of the job's task, as many as its settings say; what is left out is said.

    Raises:
        UserError, OSError: as `read_squad`; questions without an answer in SQuAD 1.1, or none such in 2.0.
    """
    hub = hub_name(job.task, job.data)
    if hub is None:
        assert job.data is not None
        files = find_squad_files(job.task, job.data)
        read = {split: (str(path), read_squad(path)) for split, path in files.items()}
    else:
        splits = read_splits(hub, SPLITS)
        read = {split: (where, from_columns(rows, where)) for split, (where, rows) in splits.items()}
    _check_version(job.task, read)
    source, questions = read["train"]
    train, misplaced = trainable(questions, source)
    if misplaced:
        job.say(
            f"{job.task.name}: {len(misplaced)} of {len(questions):,} training questions are left out, their "
            f"answers do not stand where answer_start says: {named(misplaced)}"
        )
    settings, dev = job.settings, read["dev"][1]
    return _sample(train, settings.max_train_examples), _sample(dev, settings.max_eval_examples)


def trainable(questions: Sequence[Question], source: str) -> tuple[list[Question], list[str]]:
    """The questions to train on, and the ids of those left out because no answer stands where the file says.

    Raises:
        UserError: none, or more than TOLERATED_MISPLACED of them misplaced.
    """
    misplaced = [question.id for question in questions if question.answers and question.span is None]
    answered = sum(bool(question.answers) for question in questions)
    if len(misplaced) > TOLERATED_MISPLACED * answered:
        raise UserError(
            f"{source}: {len(misplaced)} of {answered} answers do not stand at their answer_start in the context "
            f"({named(misplaced)}); it counts characters (code points) of the context, from 0"
        )
    left_out = set(misplaced)
    kept = [question for question in questions if question.id not in left_out]
    if not kept:
        raise UserError(f"{source}: no questions to train on")
    return kept, misplaced


def questions_digest(questions: Sequence[Question]) -> str:
    """SHA-256 over everything that is known of the questions."""
    digest = hashlib.sha256()
    for question in questions:
        fields = (question.id, question.question, question.context, question.answers, question.starts)
        digest.update(json.dumps(fields).encode())
    return digest.hexdigest()


def _read_json(path: Path, kind: TypeAdapter[Any], what: str) -> Any:
    """The content of a .json or .json.gz file; UserError, with the place, for one that is not `what`."""
    try:
        content = read_file(path)
        content = gzip.decompress(content) if content.startswith(GZIP) else content
        return kind.validate_json(content, strict=True)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is not a whole JSON file ({error}); {MEND}") from None
    except ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            raise UserError(f"{path} is not a whole JSON file ({error.errors()[0]['msg']}); {MEND}") from None
        raise UserError(f"{path}: not {what}: {_first_fault(error)}; {MEND}") from None


def _first_fault(error: ValidationError) -> str:
    """ "data[0].paragraphs[3].context is missing"."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    if first["type"] == "missing":
        return f"{place.lstrip('.')} is missing"
    return f"{place.lstrip('.') or 'the whole'}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _checked(questions: list[Question], source: str) -> list[Question]:
    if not questions:
        raise UserError(f"{source}: there are no questions in it; {MEND}")
    for question in questions:
        if not question.context.strip():
            raise UserError(f"{source}: the context of question {question.id} is empty; {MEND}")
    repeated = [key for key, count in Counter(question.id for question in questions).items() if count > 1]
    if repeated:
        raise UserError(f"{source}: several questions have one id ({named(repeated)}); ids must be unique")
    return questions


def _first_file(folder: Path, names: Sequence[str]) -> list[Path]:
    """The first of the files that is there, if any."""
    return [folder / name for name in names if (folder / name).is_file()][:1]


def _sample(questions: Sequence[Question], count: int | None) -> list[Question]:
    return [questions[index] for index in sampled(len(questions), count)]


def _check_version(task: Task, read: dict[str, tuple[str, list[Question]]]) -> None:
    for source, questions in read.values():
        first = next((question.id for question in questions if not question.answers), None)
        if task.name == "squad" and first is not None:
            raise UserError(
                f"{source}: question {first} has no answer, as in SQuAD 2.0; give --task squad_v2"
            )
    if task.name == "squad_v2" and not any(has_unanswerable(questions) for _, questions in read.values()):
        raise UserError(
            f"{read['dev'][0]}: every question has an answer, as in SQuAD 1.1; give --task squad, or the files of 2.0"
        )
