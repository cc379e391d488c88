"""Scores, speeds, ablations and runs that a report refuses, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.shard_format.manifest import Manifest
from launch.report import main, parse
from launch.reporting.comparison import compare, refuse_other_tokenizer
from launch.reporting.inputs import read_ablation, read_inference, read_model_scores
from launch.reporting.runs import read_run_facts
from tests.tiny_shards import write_tiny_shards
from tests.unit.launch.reporting.given import (
    ablation_json,
    finished_run,
    inference_json,
    scores,
    write_scores,
)
from train.config import Config
from train.config_sections.data import DataConfig
from train.config_sections.model import ModelConfig
from train.errors import UserError


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda given: given.pop(key)


BROKEN_SCORES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (
        lambda given: given.update(task="rte"),
        r"sst2/scores.json: these are scores of rte, in a folder of sst2",
    ),
    (lambda given: given.update(task="sst9"), r"sst2/scores.json: there is no task 'sst9'"),
    (
        lambda given: given["median"].update(score=float("nan")),
        r"scores.json: median.score is nan, no number",
    ),
    (lambda given: given["median"].update(score=None), r"scores.json: median.score is None, no number"),
    (lambda given: given["median"].pop("score"), r'scores.json: "median" holds no "score"'),
    (without("median"), r"scores.json: lacks 'median'"),
    (without("parameters"), r"scores.json: lacks 'parameters'"),
    (lambda given: given.update(spread=[1, 2]), r"scores.json: is not such a file"),
]


@pytest.mark.parametrize(("spoil", "message"), BROKEN_SCORES)
def test_broken_scores_are_named(
    spoil: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    content = scores("sst2", 90.0)
    spoil(content)
    write_scores(tmp_path, sst2=content)
    with pytest.raises(UserError, match=message):
        read_model_scores("m", tmp_path)


def test_files_that_are_cut_off_or_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing holds no TASK/scores.json .*launch/finetune.py"):
        read_model_scores("m", tmp_path / "nothing")
    write_scores(tmp_path, sst2=scores("sst2", 1.0))
    (tmp_path / "sst2" / "scores.json").write_text('{"task": "ss')
    with pytest.raises(UserError, match=r"sst2/scores.json: is not such a file"):
        read_model_scores("m", tmp_path)
    with pytest.raises(UserError, match=r"there is no file .*none.json"):
        read_ablation(tmp_path / "none.json")
    (tmp_path / "a.json").write_text(json.dumps({"variants": []}))
    with pytest.raises(UserError, match=r"a.json: holds no variants"):
        read_ablation(tmp_path / "a.json")
    broken = ablation_json()
    broken["variants"][1]["heldout"]["heldout_kl"] = float("inf")
    (tmp_path / "a.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match=r"a.json: variants.1.heldout.heldout_kl is inf, no number"):
        read_ablation(tmp_path / "a.json")
    speeds = inference_json()
    speeds["models"][1]["name"] = "teacher"
    (tmp_path / "i.json").write_text(json.dumps(speeds))
    with pytest.raises(UserError, match=r"i.json: its models are named \['teacher', 'teacher'\]"):
        read_inference(tmp_path / "i.json")
    speeds["models"][0]["rows"][0]["latency_ms"] = "fast"
    (tmp_path / "i.json").write_text(json.dumps(speeds))
    with pytest.raises(UserError, match=r"i.json: models.0.rows.0.latency_ms is 'fast', no number"):
        read_inference(tmp_path / "i.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to report: give run folders, --scores, --inference, --ablation or --study"),
        (["--scores", "a={s}", "a={s}"], "there is a model 'a' already; each needs a name of its own"),
        (["--scores", "{s}"], "give NAME=DIR"),
        (["--scores", "a={s}", "--reference", "b"], "--reference b: --scores has a"),
        (["--ablation", "x", "--reference", "b"], "--reference b names a model of --scores"),
        (["--scores", "a={s}", "--curves", "x"], "--curves adds to the plot of runs"),
        (["{r}", "{other}"], "two runs are named 'student'"),
        (["nowhere"], "nowhere is not a run folder: it holds no metrics.jsonl"),
        (["{s}"], "s is not a run folder: it holds no metrics.jsonl"),
    ],
)
def test_bad_usage_is_named(words: list[str], message: str, tmp_path: Path, run_folder: Path) -> None:
    folder = write_scores(tmp_path / "s", sst2=scores("sst2", 90.0))
    places = {"s": folder, "r": run_folder, "other": finished_run(tmp_path / "other")}
    given = [word.format(**places) for word in words]
    with pytest.raises(UserError, match=message):
        main([*given, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_run_s_folder_or_a_file_is_no_place_for_the_report(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    summary = (run_folder / "summary.json").read_bytes()
    for out, message in (
        (run_folder, "is a run's folder, whose summary.json"),
        (tmp_path / "file", "is not a folder; give another name"),
    ):
        with pytest.raises(UserError, match=message):
            parse([str(run_folder), "--out", str(out)])
    assert (run_folder / "summary.json").read_bytes() == summary


def test_an_unfinished_run_is_named(run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "summary.json").unlink()
    with pytest.raises(UserError, match=r"student is not finished: it holds no summary.json yet"):
        main([str(run_folder), "--out", str(tmp_path / "out")])


def test_a_folder_of_no_task_is_named_and_a_task_stands_there_once(tmp_path: Path) -> None:
    write_scores(tmp_path / "copy", sst2_old=scores("sst2", 1.0))
    with pytest.raises(UserError, match=r"sst2_old/scores.json: there is no task 'sst2_old'"):
        read_model_scores("m", tmp_path / "copy")
    write_scores(tmp_path, **{"sst2": scores("sst2", 1.0), "SST-2": scores("sst2", 2.0)})
    with pytest.raises(UserError, match=rf"{tmp_path} holds two folders of scores of sst2; move one away"):
        read_model_scores("m", tmp_path)


def test_the_folder_of_one_task_is_named(tmp_path: Path) -> None:
    folder = write_scores(tmp_path / "scores", rte=scores("rte", 60.0))
    with pytest.raises(
        ValueError, match=rf"that is the folder of one task; give the one that holds it, {folder}"
    ):
        main(["--out", str(tmp_path / "out"), "--scores", f"a={folder / 'rte'}"])


def test_a_run_of_another_tokenizer_is_named(tmp_path: Path, teacher_folder: str, shards_folder: str) -> None:
    refuse_other_tokenizer(Path(teacher_folder), Manifest.load(shards_folder))
    with pytest.raises(
        UserError, match=r"has another tokenizer than the first run's shards, .* report it apart"
    ):
        refuse_other_tokenizer(Path(teacher_folder), write_tiny_shards(tmp_path))


def test_a_run_that_trained_for_no_step_is_whole(run_folder: Path) -> None:
    """A study's untrained cut."""
    path = run_folder / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "steps": 0, "tokens": 0}))
    assert read_run_facts(run_folder).tokens == 0


def test_shards_that_count_from_another_folder_are_named(tmp_path: Path, teacher_folder: str) -> None:
    config = Config(data=DataConfig(shards="no/shards"), model=ModelConfig(teacher=teacher_folder))
    with pytest.raises(UserError, match=r"mine/config.yaml names data.shards='no/shards', which is not here"):
        compare([tmp_path / "mine"], [config])
