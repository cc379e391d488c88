"""Fine-tuning refuses damaged files of its own folder, and settings under which a model sees nothing, by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.tiny_tasks import job_for, save_encoder, write_pairs, write_sst2
from train.errors import NonFiniteError, UserError
from train.finetuning.results import read_scores
from train.finetuning.runs import check_task, finished_seeds, run_task


@pytest.mark.parametrize("text", ['{"score', "[]", '{"accuracy": 50.0}', '{"score": NaN}', '{"score": null}'])
def test_a_damaged_file_of_a_seeds_scores_is_named(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "seed-0"
    folder.mkdir()
    (folder / "scores.json").write_text(text)
    with pytest.raises(
        UserError, match=re.escape(f"{folder}/scores.json is no file of a seed's scores")
    ) as error:
        finished_seeds(tmp_path)
    assert f"; delete {folder} and run" in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"median": {"score": float("nan")}}, {"seeds": []}, {"seeds": {"0": {}}}]
)
def test_scores_that_are_no_numbers_are_not_taken_for_finished(tmp_path: Path, changes: dict) -> None:
    whole = {"task": "sst2", "median": {"score": 50.0}, "seeds": {"0": {"score": 50.0}}}
    (tmp_path / "scores.json").write_text(json.dumps(whole))
    assert read_scores(tmp_path) == whole
    (tmp_path / "scores.json").write_text(json.dumps({**whole, **changes}))
    with pytest.raises(UserError, match=r"scores\.json is no file of scores; delete it and run"):
        read_scores(tmp_path)


@pytest.mark.parametrize("text", ["", '{"task": "ss', "[1]"])
def test_a_damaged_options_file_is_named(tmp_path: Path, text: str) -> None:
    model, data = save_encoder(tmp_path / "bert"), write_sst2(tmp_path / "data")
    job, _ = job_for(tmp_path / "out", model, "sst2", data)
    job.folder.mkdir(parents=True)
    (job.folder / "options.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{job.folder}/options.json is damaged (")):
        run_task(job, range(1))


@pytest.mark.parametrize(("task", "special", "least"), [("sst2", 2, 3), ("rte", 3, 5)])
def test_a_length_without_room_for_text_is_refused(
    tmp_path: Path, task: str, special: int, least: int
) -> None:
    model, data = save_encoder(tmp_path / "bert"), write_sst2(tmp_path / "data")
    header = "index\tsentence1\tsentence2\tlabel"
    write_pairs(data / "RTE", header, ["entailment", "not_entailment"])
    check_task(job_for(tmp_path, model, task, data, "--max-length", str(least))[0])
    message = f"--max-length is {least - 1}, of which {model} takes {special} for special tokens; give at least {least}"
    with pytest.raises(UserError, match=re.escape(message)):
        check_task(job_for(tmp_path, model, task, data, "--max-length", str(least - 1))[0])


def test_outputs_that_overflow_say_what_to_do(tmp_path: Path) -> None:
    model, data = save_encoder(tmp_path / "bert"), write_sst2(tmp_path / "data", 16, 4)
    too_high = ["--learning-rate", "1e30", "--epochs", "1", "--batch-size", "8"]
    job, _ = job_for(tmp_path / "out", model, "sst2", data, *too_high)
    with pytest.raises(
        NonFiniteError, match=r"outputs are no numbers any more; give a lower --learning-rate than 1e\+30"
    ):
        run_task(job, range(1))
