"""The table of tasks, the settings and what scores.json makes of seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.finetune import job_of, parser, table_of, tasks_of
from train.errors import UserError
from train.finetuning.results import macro_average, median_and_spread, read_scores, write_scores
from train.finetuning.settings import settings_for
from train.finetuning.tasks import GLUE, TASKS, task_named


def test_nine_tasks_of_glue_and_the_others() -> None:
    assert GLUE == ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
    assert set(TASKS) - set(GLUE) == {"imdb", "squad", "squad_v2"}
    assert [task.name for task in tasks_of(["SST-2", "glue", "squad-v2"])][:2] == ["sst2", "cola"]
    assert len(tasks_of(["sst2", "glue"])) == 9


def test_an_unknown_task_is_refused_with_the_list() -> None:
    with pytest.raises(
        UserError, match=r"there is no task 'sst3'; the tasks are cola, sst2, mrpc, .*squad_v2"
    ):
        task_named("sst3")


def test_settings_are_the_tasks_own_unless_given() -> None:
    imdb = settings_for(task_named("imdb"), {"epochs": 1.0, "learning_rate": None})
    assert (imdb.epochs, imdb.learning_rate, imdb.batch_size, imdb.max_length) == (1.0, 2e-5, 16, 512)
    assert settings_for(task_named("mrpc"), {}).epochs == 5
    taught = settings_for(task_named("rte"), {"hard_weight": 0.25}, ["teacher"])
    assert (taught.temperature, taught.hard_weight) == (2.0, 0.25)
    assert "temperature" not in settings_for(task_named("stsb"), {}, ["teacher"]).as_json()
    assert "doc_stride" not in imdb.as_json()


@pytest.mark.parametrize(
    ("given", "teachers", "said"),
    [
        ({"learning_rate": 0.0}, (), "--learning-rate is 0.0; give a number above 0"),
        ({"learning_rate": float("nan")}, (), "--learning-rate is nan"),
        ({"epochs": float("inf")}, (), "--epochs is inf"),
        ({"max_train_examples": 0}, (), "--max-train-examples is 0; give at least 1"),
        ({"warmup_ratio": 1.5}, (), "--warmup-ratio is 1.5; give a number from 0 to 1"),
        ({"doc_stride": 64}, (), "--doc-stride has no effect on sst2"),
        ({"temperature": 3.0}, (), "--temperature has no effect without --teacher"),
        ({"hard_weight": 0.0}, (), "--hard-weight has no effect without --teacher"),
        (
            {"hard_weight": 0.5, "unlabelled_only": True},
            ("t",),
            "--hard-weight has no effect with --unlabelled-only",
        ),
    ],
)
def test_settings_that_cannot_be_or_do_nothing_are_refused(given: dict, teachers: tuple, said: str) -> None:
    with pytest.raises(UserError, match=said):
        settings_for(task_named("sst2"), given, teachers)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--unlabelled", "x"], "--unlabelled has no effect without --teacher"),
        (["--teacher", "t", "--unlabelled-only"], "--unlabelled-only needs --unlabelled FILE"),
        (["--teacher", "t", "--hard-weight", "1"], "--hard-weight 1 leaves the soft labels out"),
        (["--checkpoint-seconds", "-1"], "--checkpoint-seconds is -1.0; give 0 or more"),
    ],
)
def test_options_that_belong_together(flags: list[str], said: str) -> None:
    options = parser().parse_args(["--model", "m", "--task", "rte", "--out", "o", *flags])
    with pytest.raises(UserError, match=said):
        job_of(task_named("rte"), options)


def test_a_path_may_contain_the_task() -> None:
    words = ["--model", "m/{task}", "--task", "rte", "--out", "o", "--teacher", "a/{task}/seed-0", "b"]
    job = job_of(task_named("rte"), parser().parse_args([*words, "--data", "hub"]))
    assert (job.model, job.teachers, job.data) == ("m/rte", ("a/rte/seed-0", "b"), None)


SEEDS = {
    2: {"accuracy": 50.0, "f1": 20.0, "score": 35.0, "seconds": 1.0, "examples_per_s": 9.0},
    0: {"accuracy": 90.0, "f1": 70.0, "score": 80.0, "seconds": 2.0, "examples_per_s": 9.0},
    1: {"accuracy": 60.0, "f1": 60.0, "score": 60.0, "seconds": 3.0, "examples_per_s": 9.0},
}


def test_median_and_spread_over_seeds() -> None:
    median, spread = median_and_spread(SEEDS)
    assert median == {"accuracy": 60.0, "f1": 60.0, "score": 60.0}
    assert spread["score"] == [35.0, 80.0]


def test_scores_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    description = {
        "task": "mrpc",
        "metrics": ["accuracy", "f1"],
        "dev_examples": {"dev": 408},
        "train_examples": 9,
    }
    written = write_scores(tmp_path, description, SEEDS)
    assert read_scores(tmp_path) == written == json.loads((tmp_path / "scores.json").read_text())
    assert list(written["seeds"]) == ["0", "1", "2"]
    assert written["versions"]["torch"]
    table = table_of([written, {**written, "task": "rte"}])
    assert "GLUE (2 of 9)" in table
    assert "35.0 to 80.0" in table
    assert read_scores(tmp_path / "elsewhere") is None
    (tmp_path / "scores.json").write_text('{"task": "mrpc"}')
    with pytest.raises(UserError, match=r"scores.json is no file of scores; delete it"):
        read_scores(tmp_path)


def test_macro_average_is_over_glue_alone() -> None:
    assert macro_average({"sst2": 90.0, "rte": 60.0, "imdb": 0.0, "squad": 0.0}) == 75.0
    assert macro_average({"imdb": 90.0}) is None
