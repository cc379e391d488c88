"""Tables of strings, from wherever they come, to the texts and labels of a task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.errors import UserError
from train.finetuning.tasks import Task

NO_LABEL = -100
"""The class of a text that nobody has labelled; a regression's is NaN."""


def sampled(total: int, count: int | None) -> np.ndarray:
    """Indices of `count` of `total` examples, always the same ones, in their order; all where there are no more."""
    if count is None or count >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(0).permutation(total)[:count])


@dataclass(frozen=True)
class Table:
    """Columns by name, all of one length."""

    columns: Mapping[str, Sequence[Any]]
    where: str
    """File or dataset, for messages."""
    rows: Sequence[int] | range
    """For each row its number in `where`, as a user would find it."""


@dataclass(frozen=True)
class Examples:
    """Texts, or pairs of them, and their labels."""

    first: list[str]
    second: list[str] | None
    labels: np.ndarray
    """(N,) int64 classes or float32 numbers; NO_LABEL or NaN where there is none."""
    keys: list[str]
    """What identifies each example: its id where it has one, else its text."""

    def __len__(self) -> int:
        return len(self.first)

    def take(self, indices: np.ndarray) -> Examples:
        second = None if self.second is None else [self.second[index] for index in indices]
        keys = [self.keys[index] for index in indices]
        return Examples([self.first[index] for index in indices], second, self.labels[indices], keys)

    def sample(self, count: int | None) -> Examples:
        """As `sampled`."""
        return self if count is None or count >= len(self) else self.take(sampled(len(self), count))

    def split(self, share: float) -> tuple[Examples, Examples]:
        """(the rest, about `share` of them), by a hash of the keys: other rows added change nothing for these."""
        digests = [int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 16**8 for key in self.keys]
        apart = np.array(digests) < share
        return self.take(np.flatnonzero(~apart)), self.take(np.flatnonzero(apart))

    def joined(self, others: Examples) -> Examples:
        second = None if self.second is None else [*self.second, *(others.second or [])]
        labels = np.concatenate([self.labels, others.labels])
        return Examples([*self.first, *others.first], second, labels, [*self.keys, *others.keys])

    def digest(self) -> str:
        """SHA-256 over texts and labels."""
        digest = hashlib.sha256(self.labels.tobytes())
        for texts in (self.first, self.second or []):
            for text in texts:
                digest.update(text.encode(errors="surrogatepass") + b"\0")
        return digest.hexdigest()


def examples_of(task: Task, table: Table, labelled: bool = True) -> Examples:
    """Pick the task's columns and read its labels.

    Args:
        labelled: False ignores a label column, if there is one.
    Raises:
        UserError: no rows, no such column (with those there are), a text or label that cannot be, with its row.
    """
    if not len(table.rows):
        raise UserError(f"{table.where} holds no examples; fetch it again")
    texts = [_text_column(task, table, names) for names in task.texts]
    if labelled:
        labels = _labels(task, table)
    elif task.is_regression:
        labels = np.full(len(table.rows), np.nan, dtype=np.float32)
    else:
        labels = np.full(len(table.rows), NO_LABEL, dtype=np.int64)
    keys = [str(key) for key in table.columns["id"]] if "id" in table.columns else texts[0]
    return Examples(texts[0], texts[1] if task.is_pair else None, labels, keys)


def _text_column(task: Task, table: Table, names: Sequence[str]) -> list[str]:
    texts = table.columns[_column(task, table, names)]
    for row, text in zip(table.rows, texts, strict=True):
        if not isinstance(text, str):
            raise UserError(f"{table.where}, row {row}: {names[0]} is {text!r}, not a text; mend it")
    return list(texts)


def _column(task: Task, table: Table, names: Sequence[str]) -> str:
    for name in names:
        if name in table.columns:
            return name
    wanted = [*(" or ".join(column) for column in task.texts), " or ".join(task.label)]
    raise UserError(
        f"{table.where} has no column {' or '.join(names)}; it has {', '.join(table.columns)}; {task.title} wants "
        f"{', '.join(wanted)}"
    )


def _labels(task: Task, table: Table) -> np.ndarray:
    try:
        column = _column(task, table, task.label)
    except UserError as error:
        raise UserError(
            f"{error}. A test set without labels cannot be scored: give train and dev sets"
        ) from None
    read = _number if task.is_regression else _class
    labels = []
    for row, value in zip(table.rows, table.columns[column], strict=True):
        number = read(task, value)
        if number is None:
            where = f"{table.where}, row {row}: {column} is"
            if str(value).strip() in ("-1", "-1.0"):
                raise UserError(
                    f"{where} -1: this is a test set without labels, which cannot be scored; give the dev set"
                )
            raise UserError(
                f"{where} {value!r}; {task.title} has {_known_labels(task)}: correct it, or remove the row"
            )
        labels.append(number)
    return np.array(labels, dtype=np.float32 if task.is_regression else np.int64)


def _class(task: Task, value: Any) -> int | None:
    """The class of a name or number; None where it is neither."""
    assert task.labels is not None
    text = str(value).strip()
    if text.lower() in task.labels:
        return task.labels.index(text.lower())
    try:
        number = int(text)
    except ValueError:
        return None
    return number if 0 <= number < len(task.labels) else None


def _number(task: Task, value: Any) -> float | None:
    """A label of a regression; None where it is no number, or outside the range."""
    assert task.label_range is not None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if task.label_range[0] <= number <= task.label_range[1] else None


def _known_labels(task: Task) -> str:
    if task.label_range is not None:
        low, high = task.label_range
        return f"numbers from {low:g} to {high:g}"
    return ", ".join(f"{index} ({name})" for index, name in enumerate(task.labels or ()))
