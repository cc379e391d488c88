"""SQuAD as it is distributed: JSON of versions 1.1 and 2.0 (.gz too), and the columns of the hub's data sets.

Nothing is guessed about a file that is something else: what is missing is named, with where it should be.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import UserError

# Answers that do not stand where the file says are left out of training, and said, up to this share; a file with more
# of them was written by other rules (offsets in bytes, another text), and is refused.
TOLERATED_MISPLACED = 0.01
NAMED_AT_MOST = 5
GZIP = b"\x1f\x8b"


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
        UserError: not JSON, or not SQuAD's: the message names the key that is missing and where.
        OSError: the file cannot be read.
    """
    content = read_json(path)
    found = []
    for article, where in _items(content, "data", str(path)):
        for paragraph, at in _items(article, "paragraphs", where):
            context = _text(paragraph, "context", at)
            for qa, place in _items(paragraph, "qas", at):
                found.append(_question(qa, context, place))
    return _checked(found, str(path))


def from_columns(rows: Iterable[Mapping[str, Any]], source: str) -> list[Question]:
    """Questions from rows as the hub's `squad` and `squad_v2` have them: id, question, context, answers {text,
    answer_start}.

    Raises:
        UserError: a column is missing or of another type.
    """
    found = []
    for index, row in enumerate(rows):
        where = f"{source}, row {index}"
        answers = _value(row, "answers", dict, where)
        texts = list(_value(answers, "text", (list, tuple), f"{where}, answers"))
        starts = list(_value(answers, "answer_start", (list, tuple), f"{where}, answers"))
        if len(texts) != len(starts):
            raise UserError(f"{where}: {len(texts)} answers, but {len(starts)} places where they start")
        fields = (_text(row, name, where) for name in ("id", "question", "context"))
        found.append(_made(*fields, texts=texts, starts=starts, where=where))
    return _checked(found, source)


def read_predictions(path: Path) -> dict[str, str]:
    """Predictions in the official format, {question id: answer}.

    Raises:
        UserError: another kind of JSON, or an answer that is no text.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: predictions are one JSON object of question id: answer, this is {_kind(content)}"
        )
    for key, value in content.items():
        if not isinstance(value, str):
            raise UserError(f'{path}: the answer to {key} is {_kind(value)}, not text ("" for no answer)')
    return content


def read_null_scores(path: Path) -> dict[str, float]:
    """{question id: how sure the system is that there is no answer}, as evaluate-v2.0.py's --na-prob-file."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: null scores are one JSON object of question id: number, this is {_kind(content)}"
        )
    for key, value in content.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{path}: the null score of {key} is {_kind(value)}, not a number")
    return {key: float(value) for key, value in content.items()}


def has_unanswerable(questions: Sequence[Question]) -> bool:
    """Whether this is SQuAD 2.0: some question has no answer."""
    return any(not question.answers for question in questions)


def golds_of(questions: Sequence[Question]) -> dict[str, tuple[str, ...]]:
    """Question id -> the texts of its answers."""
    return {question.id: question.answers for question in questions}


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


def named(ids: Sequence[str]) -> str:
    """A few ids for a message, and how many more there are."""
    more = f" and {len(ids) - NAMED_AT_MOST} more" if len(ids) > NAMED_AT_MOST else ""
    return ", ".join(ids[:NAMED_AT_MOST]) + more


def read_json(path: Path) -> Any:
    """The content of a .json or .json.gz file."""
    try:
        content = path.read_bytes()
        return json.loads(gzip.decompress(content) if content.startswith(GZIP) else content)
    except (ValueError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is not a whole JSON file ({error})") from None


def _question(qa: Any, context: str, where: str) -> Question:
    key = _text(qa, "id", where)
    where = f"{where} (id {key})"
    answers = [] if qa.get("is_impossible") is True else list(_items(qa, "answers", where))
    texts = [_text(answer, "text", place) for answer, place in answers]
    starts = [_value(answer, "answer_start", int, place) for answer, place in answers]
    return _made(key, _text(qa, "question", where), context, texts=texts, starts=starts, where=where)


def _made(
    key: str, question: str, context: str, *, texts: list[Any], starts: list[Any], where: str
) -> Question:
    if not context.strip():
        raise UserError(f"{where}: the context of question {key} is empty")
    return Question(key, question, context, tuple(texts), tuple(int(start) for start in starts))


def _checked(questions: list[Question], source: str) -> list[Question]:
    if not questions:
        raise UserError(f"{source}: there are no questions in it")
    repeated = [key for key, count in Counter(question.id for question in questions).items() if count > 1]
    if repeated:
        raise UserError(f"{source}: several questions have one id ({named(repeated)}); ids must be unique")
    return questions


def _items(parent: Any, key: str, where: str) -> Iterable[tuple[Any, str]]:
    """The items of the list `parent[key]`, each with its place in words."""
    for index, item in enumerate(_value(parent, key, list, where)):
        yield item, f"{where}: {key}[{index}]" if key == "data" else f"{where}.{key}[{index}]"


def _value(parent: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    if not isinstance(parent, Mapping):
        raise UserError(f"{where}: not SQuAD: {_kind(parent)} stands where an object with {key!r} belongs")
    if key not in parent:
        raise UserError(
            f"{where}: not SQuAD: {key!r} is missing (there are: {', '.join(map(str, parent)) or 'none'})"
        )
    value = parent[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: not SQuAD: {key!r} is {_kind(value)}")
    return value


def _text(parent: Any, key: str, where: str) -> str:
    text: str = _value(parent, key, str, where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {key!r} is not valid Unicode ({error.reason} at {error.start})") from None
    return text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(
        type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    )
