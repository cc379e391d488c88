"""The tasks' datasets on the Hugging Face hub, through `datasets`."""

from __future__ import annotations

from typing import Any

from data_prep.sources.tables import quiet_hub
from train.errors import UserError, one_line
from train.finetuning.examples import Examples, Table, examples_of
from train.finetuning.tasks import Task

PREFIX = "hub:"


def hub_name(task: Task, data: str | None) -> tuple[str, str | None] | None:
    """(dataset, configuration) to load; None where `data` is a local folder.

    Args:
        data: None for the task's own dataset, hub:NAME[:CONFIG] for another with the same columns, or a folder.
    """
    if data is None:
        return task.hub
    if not data.startswith(PREFIX):
        return None
    name, _, config = data.removeprefix(PREFIX).partition(":")
    if not name:
        raise UserError(f"--data {data}: write hub:NAME or hub:NAME:CONFIG")
    return name, config or None


def load_hub(name: str, config: str | None) -> Any:
    """A DatasetDict.

    Raises:
        UserError: it cannot be loaded, with what the hub's client says and the way without it.
    """
    import datasets

    quiet_hub()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        return datasets.load_dataset(name, config)
    except Exception as error:
        raise UserError(
            f"the dataset {name}{f' ({config})' if config else ''} cannot be loaded: {one_line(error)}; "
            "with local files, give --data FOLDER"
        ) from None


def read_hub(task: Task, name: str, config: str | None) -> tuple[Examples, dict[str, Examples]]:
    """(train, dev sets by name), as `readers.read_examples`.

    Raises:
        UserError: no such dataset or split; see `examples_of`.
    """
    splits = load_hub(name, config)
    train = _examples(task, name, splits, ("train",))
    return train, {dev: _examples(task, name, splits, names) for dev, names in task.dev.items()}


def _examples(task: Task, name: str, splits: Any, names: tuple[str, ...]) -> Examples:
    found = next((split for split in names if split in splits), None)
    if found is None:
        raise UserError(f"the dataset {name} has no split {' or '.join(names)}; it has {', '.join(splits)}")
    dataset = splits[found]
    columns = {column: dataset[column][:] for column in dataset.column_names if column != "idx"}
    for column, feature in dataset.features.items():
        if column in task.label and getattr(feature, "names", None):
            classes = dict(enumerate(feature.names))
            columns[column] = [classes.get(value, value) for value in columns[column]]
    return examples_of(task, Table(columns, f"{name}, split {found}", range(1, dataset.num_rows + 1)))
