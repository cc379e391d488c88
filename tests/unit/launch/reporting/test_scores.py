"""Notes below the tables of scores, and the tables of own tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.report import main
from launch.reporting.inputs import read_model_scores
from launch.reporting.scores import own_table, retention_table
from tests.unit.launch.reporting.given import plain, scores, write_scores
from train.errors import UserError
from train.finetuning.tasks import SPLIT_OFF


def notes_of(tmp_path: Path, *models: dict[str, dict[str, Any]]) -> str:
    """What stands below the tables of scores."""
    words = []
    for index, by_task in enumerate(models):
        words += ["--scores", f"m{index}={write_scores(tmp_path / str(index), **by_task)}"]
    assert main(["--out", str(tmp_path / "out"), *words]) == 0
    return plain((tmp_path / "out" / "report.md").read_text())


def test_how_much_of_a_task_was_scored_is_told(tmp_path: Path) -> None:
    part, whole = {"max_train_examples": 100}, {"max_train_examples": 101, "max_eval_examples": 51}
    both = {"matched": 30, "mismatched": 20}
    said = notes_of(
        tmp_path,
        {
            "mnli": scores("mnli", 40.0, dev_examples=both, settings=whole),
            "rte": scores("rte", 50.0, settings=part),
            "imdb": scores("imdb", 60.0, dev_examples={SPLIT_OFF: 10}),
        },
    )
    assert "training and dev: MNLI 100 and 50; RTE 100 and 50, a part." in said
    assert "mean of both dev sets for MNLI, else accuracy" in said
    assert "training and dev: IMDb 100 and 10." in said
    assert "IMDb of m0: scored on a part of the training set" in said


def test_each_model_s_examples_are_told(tmp_path: Path) -> None:
    whole = scores("imdb", 80.0, train_examples=25_000, dev_examples={"dev": 25_000})
    part = scores("imdb", 60.0, dev_examples={SPLIT_OFF: 10}, settings={"max_train_examples": 100})
    said = notes_of(tmp_path, {"imdb": whole}, {"imdb": part})
    assert "training and dev: IMDb 25,000 and 25,000 (m0) or 100 and 10, a part (m1)." in said
    assert "IMDb of m1: scored on a part of the training set" in said
    assert "different settings" not in said


@pytest.mark.parametrize(
    ("dev", "expected"),
    [({"matched": 50}, "the matched dev set alone for MNLI"), (None, "STS-B, else accuracy")],
)
def test_what_is_said_of_mnli(dev: dict[str, int] | None, expected: str, tmp_path: Path) -> None:
    given = {"rte": scores("rte", 50.0)}
    if dev is not None:
        given["mnli"] = scores("mnli", 40.0, dev_examples=dev)
    assert expected in notes_of(tmp_path, given)


def test_models_fine_tuned_differently_are_told(tmp_path: Path) -> None:
    """A teacher's soft labels aside, whose settings the others cannot have."""
    slow = scores("rte", 50.0, settings={"learning_rate": 2e-5, "max_length": 128})
    fast = scores("rte", 52.0, settings={"learning_rate": 5e-4, "max_length": 64, "temperature": 2.0})
    said = notes_of(tmp_path, {"rte": slow}, {"rte": fast})
    assert "RTE: the models were fine-tuned with different settings (learning_rate, max_length)." in said
    taught = scores("rte", 52.0, settings={"learning_rate": 2e-5, "max_length": 128, "temperature": 2.0})
    assert "different settings" not in notes_of(tmp_path / "same", {"rte": slow}, {"rte": taught})


def test_tasks_of_ones_own_have_a_table(tmp_path: Path) -> None:
    own = {"format": "csv", "labels": ["a", "b"]}
    more = {"own": own, "metrics": {"macro_f1": 71.5}}
    one = write_scores(tmp_path / "one", news=scores("news", 80.0, **more), rte=scores("rte", 60.0))
    two = write_scores(tmp_path / "two", news=scores("news", 60.0, **more))
    models = [read_model_scores("teacher", one), read_model_scores("student", two)]
    table = own_table(models)
    assert table is not None
    assert [row[0] for row in table.rows] == ["news, accuracy", "news, macro f1"]
    assert table.rows[0][1:] == ["80.0 (78.5 to 80.5)", "60.0 (58.5 to 60.5)"]
    kept = retention_table(models, "teacher")
    assert kept is not None
    assert kept.rows[0][:2] == ["news", "75.0%"]
    with pytest.raises(UserError, match="there is no task 'news'"):
        read_model_scores("x", write_scores(tmp_path / "x", news=scores("news", 80.0)))
