"""Tables of strings, from wherever they come, to the texts and labels of a task."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.errors import UserError
from train.finetuning.tasks import Task

NO_LABEL = -100
"""The class of a text that nobody has labelled; a regression's is NaN."""
MAX_NAMES = 20
"""So many of the labels that there are does a message name."""


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

    first: list[Any]
    """Texts; of a task of tokens, sequences of words."""
    second: list[str] | None
    labels: np.ndarray
    """(N,) int64 classes or float32 numbers; (N, C) float32, 1 for each class that a text has; of a task of tokens (N,)
    objects, an int64 array of classes for each text. NO_LABEL or NaN where there is none."""
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
        arrays = self.labels if self.labels.dtype == object else [self.labels]
        digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays))
        for texts in (self.first, self.second or []):
            for text in texts:
                whole = text if isinstance(text, str) else "\n".join(text)
                digest.update(whole.encode(errors="surrogatepass") + b"\0")
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
    is_text = _is_words if task.kind == "tokens" else _is_text
    texts = [_text_column(task, table, names, is_text) for names in task.texts]
    if labelled:
        labels = _labels(task, table)
    elif task.is_regression or task.many:
        shape = (len(table.rows), len(task.labels or ())) if task.many else (len(table.rows),)
        labels = np.full(shape, np.nan, dtype=np.float32)
    else:
        labels = np.full(len(table.rows), NO_LABEL, dtype=np.int64)
    keys = [text if isinstance(text, str) else " ".join(text) for text in texts[0]]
    if "id" in table.columns:
        pairs = zip(table.columns["id"], keys, strict=True)
        keys = [text if key is None else str(key) for key, text in pairs]
    return Examples(texts[0], texts[1] if task.is_pair else None, labels, keys)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_words(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_text, value))


def _text_column(task: Task, table: Table, names: Sequence[str], is_text: Callable[[Any], bool]) -> list[Any]:
    wanted = "a list of words" if task.kind == "tokens" else "a text"
    texts = table.columns[column_of(task, table, names)]
    for row, text in zip(table.rows, texts, strict=True):
        if not is_text(text):
            raise UserError(f"{table.where}, row {row}: {names[0]} is {text!r}, not {wanted}; mend it")
    return list(texts)


def column_of(task: Task, table: Table, names: Sequence[str]) -> str:
    """The first of `names` that the table has; UserError, with the columns that it has, where it has none."""
    for name in names:
        if name in table.columns:
            return name
    wanted = [*(" or ".join(column) for column in task.texts), " or ".join(task.label)]
    name_them = "; name them with --text and --label" if task.own else ""
    raise UserError(
        f"{table.where} has no column {' or '.join(names)}; it has {', '.join(table.columns)}; {task.title} wants "
        f"{', '.join(wanted)}{name_them}"
    )


def _labels(task: Task, table: Table) -> np.ndarray:
    if task.many and len(task.label) > 1:
        return _indicators(task, table)
    try:
        column = column_of(task, table, task.label)
    except UserError as error:
        raise UserError(
            f"{error}. A test set without labels cannot be scored: give train and dev sets"
        ) from None
    if task.kind == "tokens":
        return _tags(task, table, column)
    read: Callable[[Task, Any], Any] = _number if task.is_regression else _classes if task.many else _class
    labels = []
    for row, value in zip(table.rows, table.columns[column], strict=True):
        label = read(task, value)
        if label is None:
            where = f"{table.where}, row {row}: {column} is"
            if task.own is None and str(value).strip() in ("-1", "-1.0"):
                raise UserError(
                    f"{where} -1: this is a test set without labels, which cannot be scored; give the dev set"
                )
            raise UserError(
                f"{where} {value!r}; {task.title} has {_known_labels(task)}: correct it, or remove the row"
            )
        labels.append(label)
    return np.array(labels, dtype=np.float32 if task.is_regression or task.many else np.int64)


def _tags(task: Task, table: Table, column: str) -> np.ndarray:
    """(N,) objects: for each text the classes of its words."""
    words = table.columns[column_of(task, table, task.texts[0])]
    found = np.empty(len(table.rows), dtype=object)
    for index, (row, text, tags) in enumerate(zip(table.rows, words, table.columns[column], strict=True)):
        where = f"{table.where}, row {row}"
        if not isinstance(tags, list | tuple) or len(tags) != len(text):
            has = f"{len(tags)} tags" if isinstance(tags, list | tuple) else f"{tags!r} for tags"
            raise UserError(f"{where}: {len(text)} words and {has}; give one tag for each word")
        classes = [_class(task, tag) for tag in tags]
        if None in classes:
            tag = tags[classes.index(None)]
            raise UserError(f"{where}: a tag is {tag!r}; {task.title} has {_known_labels(task)}: correct it")
        found[index] = np.array(classes, dtype=np.int64)
    return found


def _indicators(task: Task, table: Table) -> np.ndarray:
    """(N, C) of columns that hold 0 or 1, one for each class."""
    found = np.empty((len(table.rows), len(task.label)), dtype=np.float32)
    for place, name in enumerate(task.label):
        column = table.columns[column_of(task, table, (name,))]
        for index, (row, value) in enumerate(zip(table.rows, column, strict=True)):
            if (text := str(value).strip().lower()) not in ("0", "1", "false", "true"):
                raise UserError(f"{table.where}, row {row}: {name} is {value!r}; give 0 or 1")
            found[index, place] = text in ("1", "true")
    return found


def _class(task: Task, value: Any) -> int | None:
    """The class of a name or, in the tasks of the table, a number; None where it is neither."""
    assert task.labels is not None
    text = str(value).strip()
    if task.own is not None:
        return task.labels.index(text) if text in task.labels else None
    if text.lower() in task.labels:
        return task.labels.index(text.lower())
    try:
        number = int(text)
    except ValueError:
        return None
    return number if 0 <= number < len(task.labels) else None


def names_in(value: Any) -> list[str]:
    """The class names in a cell: of a list, also as JSON, or of a text with "|" between them."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    names = value if isinstance(value, list | tuple) else str(value).split("|") if value is not None else []
    return [name for name in (str(name).strip() for name in names) if name]


def _classes(task: Task, value: Any) -> list[float] | None:
    """(C,) zeros and ones; None where a name is not known."""
    assert task.labels is not None
    names = names_in(value)
    return [float(label in names) for label in task.labels] if set(names) <= set(task.labels) else None


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
    labels = task.labels or ()
    if task.own is not None:
        more = f" and {len(labels) - MAX_NAMES} more" if len(labels) > MAX_NAMES else ""
        return f"the labels of its training set: {', '.join(labels[:MAX_NAMES])}{more}"
    return ", ".join(f"{index} ({name})" for index, name in enumerate(labels))
