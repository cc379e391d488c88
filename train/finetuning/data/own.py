"""A user's own data as a task: a row of the table of tasks, made from files and a few words about them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.finetuning.data.examples import Table, column_of, names_in
from train.finetuning.data.readers import hub_name, hub_tables
from train.finetuning.data.tables import FORMATS, read_table
from train.finetuning.tasks import TASKS, OwnFiles, Settings, Task

LABEL_TYPES = ("class", "classes", "number", "tags")
"""One class for a text, any number of classes, a number, a class for each word."""
SPLIT_SHARE = 0.1
NUMBERS = (-1e9, 1e9)
MAX_CLASSES = 10_000
_METRICS = {
    "class": (("accuracy", "macro_f1"), ("micro_f1", "matthews", "f1")),
    "classes": (("micro_f1", "macro_f1"), ("accuracy",)),
    "number": (("pearson", "spearman"), ()),
    "tags": (("entity_f1",), ("accuracy", "macro_f1", "micro_f1")),
}
"""Type of label -> the metrics without --metrics, and which else there are."""


@dataclass(frozen=True)
class OwnOptions:
    """What the command line says of a task of one's own; None and () where it says nothing."""

    dev: str | None = None
    columns: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    label: tuple[str, ...] = ()
    label_type: str | None = None
    metrics: tuple[str, ...] = ()


def is_own(name: str) -> bool:
    """Whether a --task is no name of the table but KIND:FILE."""
    return name.partition(":")[0] in (*FORMATS, "hub") and ":" in name


def own_task(name: str, options: OwnOptions) -> Task:
    """The task of KIND:FILE.

    The labels are those of the training set, in their alphabetical or numerical order; of tags, "O" comes first.

    Raises:
        UserError: no such file, columns, labels or metrics, with the option that helps.
    """
    kind, _, path = name.partition(":")
    label_type = _label_type(name, options)
    tokens = label_type == "tags"
    plain = own_name(name)
    task = Task(
        name=plain,
        title=plain,
        folders=(),
        texts=tuple((column,) for column in options.text)
        or ((("tokens", "words") if tokens else ("text",)),),
        metrics=_metrics(label_type, options.metrics),
        hub=("", None),
        labels=None if label_type == "number" else (),
        label=options.label or (("tags", "ner_tags") if tokens else ("label",)),
        many=label_type == "classes",
        label_range=NUMBERS if label_type == "number" else None,
        headerless=options.columns or None,
        split_off=SPLIT_SHARE,
        kind="tokens" if tokens else "sequence",
        own=OwnFiles(kind, name if kind == "hub" else path, options.dev),
        defaults=Settings(batch_size=16 if tokens else 32),
    )
    table = _training_table(task)
    for column in task.texts:
        column_of(task, table, column)
    if label_type != "number":
        labels = _labels(task, table)
        task = replace(task, labels=labels)
        if tokens and not options.metrics and not has_entities(labels):
            task = replace(task, metrics=("accuracy", "macro_f1"))
        _check_labels(task)
    return task


def _label_type(name: str, options: OwnOptions) -> str:
    """One of LABEL_TYPES; UserError where an option has no effect, or a file is not there."""
    kind, _, path = name.partition(":")
    if options.dev and kind == "hub":
        raise UserError(
            f"--dev {options.dev} has no effect on {name}, whose dev set is its split dev or validation, else a "
            "tenth of its training set; leave it out"
        )
    if options.columns and kind in ("jsonl", "hub"):
        raise UserError(f"--columns has no effect on {name}, whose columns have names; leave it out")
    for file in (path, options.dev) if kind != "hub" else ():
        if file is not None and not Path(file).is_file():
            raise UserError(f"there is no file {file}; give --task {kind}:FILE, and --dev FILE")
    label_type = options.label_type or ("tags" if kind == "conll" else "class")
    tokens = label_type == "tags"
    if kind == "conll" and not tokens:
        raise UserError(f"--label-type {label_type} has no effect on {name}, which has tags; leave it out")
    for flag, given in (("--text", options.text), ("--label", options.label)):
        if kind == "conll" and given and not options.columns:
            raise UserError(
                f"{flag} {' '.join(given)} has no effect on {name}, whose columns have no names (the token is the "
                "first, the tag the last); name all of them with --columns, or leave it out"
            )
    if tokens and kind in ("csv", "tsv"):
        raise UserError(f"{name}: tags are read from conll:FILE, jsonl:FILE or hub:NAME; give one of these")
    if len(options.label) > 1 and label_type != "classes":
        raise UserError(
            f"--label names {len(options.label)} columns; of 0 and 1, one for each class, they go with "
            "--label-type classes"
        )
    if len(options.text) > (1 if tokens else 2):
        raise UserError(f"--text names {len(options.text)} columns; give one, or two of a pair of texts")
    return label_type


def describe(task: Task) -> dict[str, Any]:
    """What distinguishes the task, for JSON."""
    assert task.own is not None
    return {
        "format": task.own.format,
        "dev": str(Path(task.own.dev).resolve()) if task.own.dev else None,
        "text": [column[0] for column in task.texts],
        "label": list(task.label),
        "labels": list(task.labels or ()),
        "columns": list(task.headerless or ()),
        "many": task.many,
        "metrics": list(task.metrics),
    }


def own_name(name: str) -> str:
    """The folder's name of a file called train, else the file's."""
    kind, _, path = name.partition(":")
    if kind == "hub":
        stem = path.partition(":")[0].rpartition("/")[2]
    else:
        file = Path(path).absolute()
        stem = file.name.removesuffix(".gz").rpartition(".")[0] or file.name
        stem = file.parent.name if stem == "train" and file.parent.name else stem
    plain = re.sub(r"[^\w.-]+", "-", stem).strip(".-") or "own"
    return f"{plain}-own" if plain in TASKS else plain


def _metrics(label_type: str, wanted: Sequence[str]) -> tuple[str, ...]:
    usual, others = _METRICS[label_type]
    unknown = [metric for metric in wanted if metric not in (*usual, *others)]
    if unknown:
        raise UserError(
            f"--metrics {unknown[0]}: there is no such metric of --label-type {label_type}; it has "
            f"{', '.join((*usual, *others))}"
        )
    return tuple(dict.fromkeys(wanted)) or usual


def _labels(task: Task, table: Table) -> tuple[str, ...]:
    """The names of the training set's labels, in order."""
    if task.many and len(task.label) > 1:
        return task.label
    column = column_of(task, table, task.label)
    found: Counter[str] = Counter()
    for row, value in zip(table.rows, table.columns[column], strict=True):
        names = _names(task, value)
        if names is None or "" in names:
            raise UserError(
                f"{table.where}, row {row}: {column} is {value!r}, no label; give one, remove the row, or name "
                "another column with --label (or another --label-type)"
            )
        found.update(names)
    numeric = all(re.fullmatch(r"-?\d{1,15}", name) for name in found)
    first = "O" if task.kind == "tokens" else None
    return tuple(sorted(found, key=lambda name: (name != first, int(name) if numeric else 0, name)))


def _names(task: Task, value: Any) -> Iterable[str] | None:
    """The labels in a cell; None where it holds nothing of the kind."""
    listed = isinstance(value, list | tuple)
    if task.kind == "tokens":
        return [str(tag).strip() for tag in value] if listed else None
    if task.many:
        return names_in(value)
    return None if listed or value is None or isinstance(value, dict) else [str(value).strip()]


def _training_table(task: Task) -> Table:
    assert task.own is not None
    hub = hub_name(task, task.own.train)
    if hub is not None:
        return hub_tables(task, hub)["train"]
    # What is left out is said when the task is read.
    return read_table(task, Path(task.own.train), lambda line: None)


def has_entities(labels: Sequence[str]) -> bool:
    """Whether tags are of the kind of B-PER, I-PER: parts of entities."""
    return any(label.startswith(("B-", "I-")) for label in labels)


def _check_labels(task: Task) -> None:
    labels = task.labels or ()
    column = task.label[0]
    if len(labels) < (1 if task.many else 2):
        only = f" (all are {labels[0]!r})" if labels else ""
        raise UserError(
            f"{task.name}: {column} has {len(labels)} labels{only}, and there is nothing to learn; name another with "
            "--label"
        )
    if len(labels) > MAX_CLASSES:
        raise UserError(
            f"{task.name}: {column} has {len(labels):,} different labels; name another column with --label, or give "
            "--label-type number"
        )
    if "f1" in task.metrics and len(labels) != 2:
        raise UserError(
            f"--metrics f1 is that of the second of two classes, and {task.name} has {len(labels)}; give macro_f1"
        )
    if "entity_f1" in task.metrics and not has_entities(labels):
        raise UserError(
            f"--metrics entity_f1 is of tags such as B-PER and I-PER, and {task.name} has none; give others"
        )
