"""Local files in their usual layouts: glue_data's .tsv, .jsonl, the folders of aclImdb; plain or .gz."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.finetuning.examples import Examples, Table, examples_of
from train.finetuning.tasks import SPLIT_OFF, Task

ENDINGS = (".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz")
MALFORMED_SHARE = 0.01
"""GLUE's own QQP has a few broken rows; more than this share is a wrong file."""


@dataclass(frozen=True)
class Files:
    """Where the sets of a task lie: files, or folders of one folder for each class."""

    train: Path
    dev: dict[str, Path]
    """Without the sets that are not there; empty where the dev set is to be split off."""


def data_folder(data: str) -> Path:
    """The folder that `--data` names; ValueError for a file, FileNotFoundError where there is none."""
    folder = Path(data)
    if folder.is_file():
        raise UserError(f"--data {data} is a file; give the folder that holds the train and dev sets")
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {data}")
    return folder


def find_files(task: Task, data: str) -> Files:
    """The task's files below `data`, which is its own folder or the one of all tasks.

    Raises:
        FileNotFoundError: none are there, with what was looked for.
        UserError: `data` is a file.
    """
    folder = data_folder(data)
    plain = {_plain(name) for name in task.folders}
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and _plain(path.name) in plain]
    for place in (*folders, folder):
        train = _find_set(task, place, ("train",))
        if train is not None:
            break
    else:
        raise FileNotFoundError(
            f"no training set of {task.title} in {data}: looked for train{'|'.join(ENDINGS)} there and in "
            f"{'|'.join(task.folders)}/"
        )
    dev = {name: path for name, names in task.dev.items() if (path := _find_set(task, place, names))}
    if not dev and task.split_off is None:
        wanted = " or ".join(names[0] for names in task.dev.values())
        raise FileNotFoundError(f"{place} has no dev set: {task.title} wants {wanted}{'|'.join(ENDINGS)}")
    return Files(train, dev)


def read_examples(
    task: Task, files: Files, say: Callable[[str], None]
) -> tuple[Examples, dict[str, Examples]]:
    """(train, dev sets by name). What is left out or split off is said aloud.

    Raises:
        UserError: see `examples_of`; damaged files.
    """
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


def read_unlabelled(task: Task, path: Path, say: Callable[[str], None]) -> Examples:
    """Texts for the teachers to label: .txt with one on each line, or .tsv or .jsonl with the task's text columns.

    Raises:
        FileNotFoundError, UserError: not there, not such a file, or single texts for a task of pairs.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--unlabelled {path}: there is no such file")
    if path.name.endswith((".txt", ".txt.gz")):
        if task.is_pair:
            names = ", ".join(column[0] for column in task.texts)
            raise UserError(
                f"--unlabelled {path}: {task.title} is about pairs of texts; give a .tsv or .jsonl with the "
                f"columns {names}"
            )
        kept = [(row, line) for row, line in enumerate(_lines(path), start=1) if line.strip()]
        column = {task.texts[0][0]: [line for _, line in kept]}
        return examples_of(task, Table(column, str(path), [row for row, _ in kept]), labelled=False)
    if not path.name.endswith(ENDINGS):
        raise UserError(f"--unlabelled {path}: give a .txt, .tsv or .jsonl file, plain or .gz")
    return examples_of(task, read_table(task, path, say, headerless=False), labelled=False)


def read_table(task: Task, path: Path, say: Callable[[str], None], headerless: bool = True) -> Table:
    """A file, or a folder with a folder of .txt files for each class, as columns.

    Args:
        headerless: whether a .tsv of this task may lack the row of column names, as CoLA's do.
    """
    if path.is_dir():
        return _read_class_folders(task, path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_jsonl(path)
    return _read_tsv(path, task.headerless if headerless else None, say)


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


def _lines(path: Path) -> Iterator[str]:
    """Lines without their ends; only "\\n" ends one: texts hold other separators of Unicode."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise UserError(f"{path}, row {number}: not UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged or cut short: {error}; fetch it again") from None


def _read_tsv(path: Path, names: Sequence[str] | None, say: Callable[[str], None]) -> Table:
    rows = [(row, line.split("\t")) for row, line in enumerate(_lines(path), start=1) if line.strip()]
    if not rows:
        raise UserError(f"{path} is empty")
    if names is None or len(rows[0][1]) != len(names):
        names = rows.pop(0)[1]
    good = [(row, cells) for row, cells in rows if len(cells) == len(names)]
    if num_bad := len(rows) - len(good):
        bad = next(row for row, cells in rows if len(cells) != len(names))
        if num_bad > MALFORMED_SHARE * len(rows):
            raise UserError(
                f"{path}: {num_bad:,} of {len(rows):,} rows do not have the {len(names)} columns {', '.join(names)}; "
                f"the first is row {bad}"
            )
        say(f"{path}: {num_bad:,} rows without {len(names)} columns are left out; the first is row {bad}")
    columns = {name: [cells[index] for _, cells in good] for index, name in enumerate(names)}
    return Table(columns, str(path), [row for row, _ in good])


def _read_jsonl(path: Path) -> Table:
    columns: dict[str, list[Any]] = {}
    numbers: list[int] = []
    for row, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, row {row}: no JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, row {row}: not a JSON object with named fields")
        if not numbers:
            columns = {name: [] for name in record}
        for name, values in columns.items():
            values.append(record.get(name))
        numbers.append(row)
    if not numbers:
        raise UserError(f"{path} is empty")
    return Table(columns, str(path), numbers)


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
