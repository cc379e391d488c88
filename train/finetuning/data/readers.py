"""The data of a task: local files in their usual layouts (glue_data's, aclImdb), a user's own, or the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.shard_format.hub import require_hub
from train.errors import UserError, one_line
from train.finetuning.data.examples import Examples, Table, examples_of
from train.finetuning.data.tables import Say, format_of, lines_of, read_table
from train.finetuning.tasks import SPLIT_OFF, NoTrainingSetError, Task, plain_name

ENDINGS = (".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz")
HUB = "hub:"


def data_folder(data: str) -> Path:
    """The folder that `--data` names; UserError where there is none."""
    folder = Path(data)
    if folder.is_file():
        raise UserError(f"--data {data} is a file; give the folder that holds the train and dev sets")
    if not folder.is_dir():
        raise UserError(f"there is no folder {data}; give --data the one that holds the train and dev sets")
    return folder


def find_files(task: Task, data: str) -> tuple[Path, dict[str, Path]]:
    """The task's files below `data`, which is its own folder or the one of all tasks.

    Returns:
        The training set and the dev sets by name: files, or folders of one folder for each class. Without the dev sets
        that are not there; none where one is to be split off.
    Raises:
        UserError: none are there, with what was looked for; `data` is no folder.
    """
    if task.own is not None:
        return Path(data), {"dev": Path(task.own.dev)} if task.own.dev else {}
    folder = data_folder(data)
    plain = {plain_name(name) for name in task.folders}
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and plain_name(path.name) in plain]
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
    return train, dev


def read_task(task: Task, data: str | None, say: Say) -> tuple[Examples, dict[str, Examples]]:
    """(train, dev sets by name) from wherever `data` points. What is left out or split off is said aloud.

    Raises:
        UserError: see `examples_of`; damaged files; no such dataset or split.
    """
    hub = hub_name(task, data)
    if hub is not None:
        tables = hub_tables(task, hub)
        dev = {name: examples_of(task, table) for name, table in tables.items()}
        train, source = dev.pop("train"), tables["train"].where
    else:
        assert data is not None
        of_training, others = find_files(task, data)
        train, source = examples_of(task, read_table(task, of_training, say)), str(of_training)
        dev = {name: examples_of(task, read_table(task, path, say)) for name, path in others.items()}
    absent = [name for name in task.dev if name not in dev]
    if not dev:
        assert task.split_off is not None
        train, part = train.split(task.split_off)
        dev[SPLIT_OFF] = part
        say(
            f"{task.name}: no dev set {'given with' if task.own and hub is None else 'beside'} {source}: "
            f"{len(part):,} of its examples serve as one, chosen by a hash"
        )
        if not len(train) or not len(part):
            raise UserError(f"{source} is too small to split a dev set off; give a dev set")
    elif absent:
        say(f"{task.name}: beside {source} there is no {', '.join(absent)} set; scored without")
    return train, dev


def read_unlabelled(task: Task, path: Path, say: Say) -> Examples:
    """Texts for the teachers to label: .txt with one on each line, or a table with the task's text columns.

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
        kept = lines_of(path)
        column = {task.texts[0][0]: [line for _, line in kept]}
        return examples_of(task, Table(column, str(path), [row for row, _ in kept]), labelled=False)
    if format_of(path) not in ("csv", "tsv", "jsonl"):
        raise UserError(f"--unlabelled {path}: give a .txt, .csv, .tsv or .jsonl file, plain or .gz")
    return examples_of(task, read_table(task, path, say, headerless=False), labelled=False)


def _find_set(task: Task, folder: Path, names: Sequence[str]) -> Path | None:
    for name in names:
        for ending in ENDINGS:
            if (folder / f"{name}{ending}").is_file():
                return folder / f"{name}{ending}"
        if task.labels and all((folder / name / label).is_dir() for label in task.labels):
            return folder / name
    return None


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
    hub: tuple[str, str | None], wanted: dict[str, tuple[str, ...]], needed: Sequence[str] | None = None
) -> dict[str, tuple[str, Any]]:
    """The splits of a dataset on the hub, by our names for them: (what messages call it, `datasets.Dataset`).

    Args:
        hub: dataset and configuration.
        wanted: our name -> the names that a split may go by.
        needed: which of ours there must be; None for all.
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
        if split is not None:
            found[own] = (f"{name}, split {split}", splits[split])
        elif needed is None or own in needed:
            raise UserError(
                f"the dataset {name} has no split {' or '.join(names)}; it has {', '.join(splits)}; give another "
                "dataset, or local files"
            )
    return found


def hub_tables(task: Task, hub: tuple[str, str | None]) -> dict[str, Table]:
    """The splits "train" and the task's dev sets, with classes by name; errors as of `read_splits`.

    Where a dev set can be split off, the dataset may have none.
    """
    needed = None if task.split_off is None else ("train",)
    found = read_splits(hub, {"train": ("train",), **task.dev}, needed)
    return {name: _hub_table(task, *split) for name, split in found.items()}


def _hub_table(task: Task, where: str, dataset: Any) -> Table:
    columns = {column: dataset[column][:] for column in dataset.column_names if column != "idx"}
    for column, feature in dataset.features.items():
        each = getattr(feature, "feature", feature)  # of a list of classes
        if column in task.label and getattr(each, "names", None):
            classes = dict(enumerate(each.names))
            columns[column] = [
                [classes.get(one, one) for one in value]
                if isinstance(value, list)
                else classes.get(value, value)
                for value in columns[column]
            ]
    return Table(columns, where, range(1, dataset.num_rows + 1))
