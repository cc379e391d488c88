"""The data of a task: local files in their usual layouts (glue_data's .tsv, .jsonl, aclImdb; plain or .gz), or the hub.

A .tsv is split at tabs here, without a library: pandas, which `datasets` reads with, fills rows that lack cells and
shifts the columns of rows that have too many, both in silence; and `datasets` turns texts that look like dates into
dates. Both kinds of row must be seen, and counted aloud.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shard_format.files import parse_json, refuse_pipe
from data_prep.shard_format.hub import require_hub
from train.errors import UserError, one_line
from train.finetuning.examples import Examples, Table, examples_of
from train.finetuning.tasks import SPLIT_OFF, NoTrainingSetError, Task

ENDINGS = (".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz")
MALFORMED_SHARE = 0.01
"""GLUE's own QQP has a few broken rows; more than this share is a wrong file."""
MEND = "mend it, or fetch the file again"
HUB = "hub:"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Files:
    """Where the sets of a task lie: files, or folders of one folder for each class."""

    train: Path
    dev: dict[str, Path]
    """Without the sets that are not there; empty where the dev set is to be split off."""


def data_folder(data: str) -> Path:
    """The folder that `--data` names; UserError where there is none."""
    folder = Path(data)
    if folder.is_file():
        raise UserError(f"--data {data} is a file; give the folder that holds the train and dev sets")
    if not folder.is_dir():
        raise UserError(f"there is no folder {data}; give --data the one that holds the train and dev sets")
    return folder


def find_files(task: Task, data: str) -> Files:
    """The task's files below `data`, which is its own folder or the one of all tasks.

    Raises:
        UserError: none are there, with what was looked for; `data` is no folder.
    """
    folder = data_folder(data)
    plain = {_plain(name) for name in task.folders}
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and _plain(path.name) in plain]
    for place in (*folders, folder):
        train = _find_set(task, place, ("train",))
        if train is not None:
            break
    else:
        raise NoTrainingSetError(
            f"no training set of {task.title} in {data}: looked for train{'|'.join(ENDINGS)} there and in "
            f"{'|'.join(task.folders)}/"
        )
    dev = {name: path for name, names in task.dev.items() if (path := _find_set(task, place, names))}
    if not dev and task.split_off is None:
        wanted = " or ".join(names[0] for names in task.dev.values())
        raise UserError(f"{place} has no dev set: {task.title} wants {wanted}{'|'.join(ENDINGS)}")
    return Files(train, dev)


def read_task(task: Task, data: str | None, say: Say) -> tuple[Examples, dict[str, Examples]]:
    """(train, dev sets by name) from wherever `data` points. What is left out or split off is said aloud.

    Raises:
        UserError: see `examples_of`; damaged files; no such dataset or split.
    """
    hub = hub_name(task, data)
    if hub is not None:
        found = read_splits(hub, {"train": ("train",), **task.dev})
        examples = {name: examples_of(task, _hub_table(task, *split)) for name, split in found.items()}
        return examples.pop("train"), examples
    assert data is not None
    files = find_files(task, data)
    train = examples_of(task, read_table(task, files.train, say))
    dev = {name: examples_of(task, read_table(task, path, say)) for name, path in files.dev.items()}
    absent = [name for name in task.dev if name not in dev]
    if not dev:
        assert task.split_off is not None
        train, part = train.split(task.split_off)
        dev[SPLIT_OFF] = part
        say(
            f"{task.name}: no dev set beside {files.train}: {len(part):,} of its examples serve as one, chosen "
            "by a hash"
        )
        if not len(train) or not len(part):
            raise UserError(f"{files.train} is too small to split a dev set off; give a dev set")
    elif absent:
        say(f"{task.name}: {files.train.parent} has no {', '.join(absent)} set; scored without")
    return train, dev


def read_unlabelled(task: Task, path: Path, say: Say) -> Examples:
    """Texts for the teachers to label: .txt with one on each line, or .tsv or .jsonl with the task's text columns.

    Raises:
        UserError: not there, not such a file, or single texts for a task of pairs.
    """
    if not path.is_file():
        raise UserError(f"--unlabelled {path}: there is no such file")
    if path.name.endswith((".txt", ".txt.gz")):
        if task.is_pair:
            names = ", ".join(column[0] for column in task.texts)
            raise UserError(
                f"--unlabelled {path}: {task.title} is about pairs of texts; give a .tsv or .jsonl with the "
                f"columns {names}"
            )
        kept = list(_lines(path))
        column = {task.texts[0][0]: [line for _, line in kept]}
        return examples_of(task, Table(column, str(path), [row for row, _ in kept]), labelled=False)
    if not path.name.endswith(ENDINGS):
        raise UserError(f"--unlabelled {path}: give a .txt, .tsv or .jsonl file, plain or .gz")
    return examples_of(task, read_table(task, path, say, headerless=False), labelled=False)


def read_table(task: Task, path: Path, say: Say, headerless: bool = True) -> Table:
    """A file, or a folder with a folder of .txt files for each class, as columns.

    Args:
        headerless: whether a .tsv of this task may lack the row of column names, as CoLA's do.
    """
    if path.is_dir():
        return _read_class_folders(task, path)
    rows = list(_lines(path))
    if not rows:
        raise UserError(f"{path} is empty; fetch it again")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _json_table(path, rows)
    return _tsv_table(path, rows, task.headerless if headerless else None, say)


def _find_set(task: Task, folder: Path, names: Sequence[str]) -> Path | None:
    for name in names:
        for ending in ENDINGS:
            if (folder / f"{name}{ending}").is_file():
                return folder / f"{name}{ending}"
        if task.labels and all((folder / name / label).is_dir() for label in task.labels):
            return folder / name
    return None


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of each that is not blank; only "\\n" ends one: texts hold other separators of Unicode."""
    number = 0
    refuse_pipe(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, content in enumerate(file, start=1):
                line = content.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if line.strip():
                    yield number, line
    except UnicodeDecodeError:
        raise UserError(f"{path}, row {number}: not UTF-8; save it as UTF-8 text") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged or cut short: {error}; fetch it again") from None


def _tsv_table(path: Path, lines: Sequence[tuple[int, str]], names: Sequence[str] | None, say: Say) -> Table:
    rows = [(row, line.split("\t")) for row, line in lines]
    if names is None or len(rows[0][1]) != len(names):
        names = rows.pop(0)[1]
    good = [(row, cells) for row, cells in rows if len(cells) == len(names)]
    if num_bad := len(rows) - len(good):
        bad = next(row for row, cells in rows if len(cells) != len(names))
        if num_bad > MALFORMED_SHARE * len(rows):
            raise UserError(
                f"{path}: {num_bad:,} of {len(rows):,} rows do not have the {len(names)} columns {', '.join(names)}; "
                f"the first is row {bad}; {MEND}"
            )
        say(f"{path}: {num_bad:,} rows without {len(names)} columns are left out; the first is row {bad}")
    columns = {name: [cells[index] for _, cells in good] for index, name in enumerate(names)}
    return Table(columns, str(path), [row for row, _ in good])


def _json_table(path: Path, lines: Sequence[tuple[int, str]]) -> Table:
    records = []
    for row, line in lines:
        record = parse_json(line, f"{path}, row {row}", MEND)
        if not isinstance(record, dict):
            raise UserError(f"{path}, row {row}: not a JSON object with named fields; {MEND}")
        records.append(record)
    columns = {name: [record.get(name) for record in records] for name in records[0]}
    return Table(columns, str(path), [row for row, _ in lines])


def _read_class_folders(task: Task, folder: Path) -> Table:
    """aclImdb: pos/ and neg/ with a text in each file, whose name is its id."""
    assert task.labels is not None
    files = [(path, label) for label in task.labels for path in sorted((folder / label).glob("*.txt"))]
    columns = {
        "id": [f"{label}/{path.stem}" for path, label in files],
        task.texts[0][0]: [path.read_text(encoding="utf-8", errors="replace") for path, _ in files],
        task.label[0]: [label for _, label in files],
    }
    return Table(columns, str(folder), range(1, len(files) + 1))


def hub_name(task: Task, data: str | None) -> tuple[str, str | None] | None:
    """(dataset, configuration) to load; None where `data` is a local folder.

    Args:
        data: None for the task's own dataset, hub:NAME[:CONFIG] for another with the same columns, or a folder.
    """
    if data is None:
        return task.hub
    if not data.startswith(HUB):
        return None
    name, _, config = data.removeprefix(HUB).partition(":")
    if not name:
        raise UserError(f"--data {data}: write hub:NAME or hub:NAME:CONFIG")
    return name, config or None


def read_splits(
    hub: tuple[str, str | None], wanted: dict[str, tuple[str, ...]]
) -> dict[str, tuple[str, Any]]:
    """The splits of a dataset on the hub, by our names for them: (what messages call it, `datasets.Dataset`).

    Args:
        hub: dataset and configuration.
        wanted: our name -> the names that a split may go by.
    Raises:
        UserError: it cannot be loaded, with what the hub's client says and the way without it; no such split.
    """
    import datasets  # takes seconds, and local files do without
    from huggingface_hub.utils import logging as hub_logging

    name, config = hub
    hub_logging.set_verbosity_error()  # without a network it warns a dozen times before it gives up
    cache = Path(datasets.config.HF_DATASETS_CACHE, name.replace("/", "___"))
    require_hub(f"the dataset {name}", cache.exists)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        splits = datasets.load_dataset(name, config)
    except Exception as error:
        raise UserError(
            f"the dataset {name}{f' ({config})' if config else ''} cannot be loaded: {one_line(error)}; "
            "with local files, give --data FOLDER"
        ) from None
    found = {}
    for own, names in wanted.items():
        split = next((split for split in names if split in splits), None)
        if split is None:
            raise UserError(
                f"the dataset {name} has no split {' or '.join(names)}; it has {', '.join(splits)}"
            )
        found[own] = (f"{name}, split {split}", splits[split])
    return found


def _hub_table(task: Task, where: str, dataset: Any) -> Table:
    columns = {column: dataset[column][:] for column in dataset.column_names if column != "idx"}
    for column, feature in dataset.features.items():
        if column in task.label and getattr(feature, "names", None):
            classes = dict(enumerate(feature.names))
            columns[column] = [classes.get(value, value) for value in columns[column]]
    return Table(columns, where, range(1, dataset.num_rows + 1))
