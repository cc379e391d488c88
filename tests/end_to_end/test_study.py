"""launch/study.py in its smallest form: two objectives, two tasks, 20 steps; stopped, and gone on with.

Its stages are the real commands, on one rank without the launcher; tests/end_to_end/test_ablate.py starts and kills
what both commands share.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForMaskedLM, AutoTokenizer

from launch import study
from launch.experiments import job
from tests.distributed.pretraining import finish, small_settings, start_command
from tests.paths import ROOT
from tests.tiny_tasks import sentences, write_sst2
from train.distributed.signals import STOPPED_AFTER_SAVING
from train.run_folder import read_summary

STEPS, TOKENS_PER_STEP = 20, 32 * 32
OWN = (
    "--data.shards",
    "--model.teacher",
    "--model.layer_map",
    "--training.max_steps",
    "--evaluation.every_steps",
)
"""What the study sets itself."""


@pytest.fixture
def words(teacher_folder: str, shards_folder: str, tmp_path: Path) -> list[str]:
    """The command line: a teacher without a head, SST-2 and CoLA."""
    teacher, data = tmp_path / "headless", write_sst2(tmp_path / "data")
    AutoModelForMaskedLM.from_pretrained(teacher_folder).base_model.save_pretrained(teacher)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(teacher)
    (data / "CoLA").mkdir()
    for seed, name in enumerate(("train", "dev")):
        rows = [f"x\t{label}\t\t{text}\n" for text, label in sentences(32, seed)]
        (data / "CoLA" / f"{name}.tsv").write_text("".join(rows))
    flags = ["--teacher", str(teacher), "--corpus", shards_folder, "--tasks", str(data)]
    flags += ["--out", str(tmp_path / "out"), "--budget-tokens", str(STEPS * TOKENS_PER_STEP), "--curve", "0"]
    flags += [
        "--students",
        "half",
        "--objectives",
        "triple,relations",
        "--score-on",
        "sst2,cola",
        "--seeds",
        "2",
    ]
    flags += ["--finetune.learning-rate=0.003", "--finetune.epochs=1"]
    return flags + [word for word in small_settings(shards_folder, "") if not word.startswith(OWN)]


def test_smallest_form(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher gets a head; its student's runs are scored beside it; a stop after the first scores costs nothing."""
    out, stages = tmp_path / "out", []

    def run_stage(command: Sequence[str], environment: object) -> int:
        if len(stages) == 1:
            stages.append("stop")
            return STOPPED_AFTER_SAVING
        script = next(word for word in command if word.endswith(".py"))
        stages.append(Path(script).name)
        place = command.index(script)
        code, output = finish(start_command(str(Path(script).relative_to(ROOT)), *command[place + 1 :]))
        assert code == 0, output
        return code

    monkeypatch.setattr(job, "run_stage", run_stage)
    assert study.main(words) == STOPPED_AFTER_SAVING
    assert (out / "teacher" / "scores" / "cola" / "scores.json").exists()
    assert study.main(words) == 0
    assert "teacher-head: the teacher gets an MLM head by continued pretraining" in capsys.readouterr().out
    runs = stages.count("pretrain.py")
    assert runs in (
        4,
        5,
    )  # the head, cut, triple, relations; relations for triple's time, where they are faster
    assert stages.count("finetune.py") == runs  # the teacher, and not its head
    study_file = json.loads((out / "study.json").read_text())
    by_name = {model["name"]: model for model in study_file["models"]}
    assert list(by_name)[:4] == ["teacher", "half-cut", "half-triple", "half-relations"]
    assert by_name["half-cut"]["tokens"] == 0
    relations = [by_name[name]["heldout"]["heldout_relation"] for name in ("half-relations", "half-cut")]
    assert by_name["half-relations"]["tokens"] == STEPS * TOKENS_PER_STEP
    assert relations[0] < relations[1]
    for model in by_name.values():
        assert all(len(model["scores"][task]["seeds"]) == 2 for task in ("sst2", "cola"))
    summary = read_summary(out / "half-triple")
    assert summary is not None
    assert summary["teacher"] == str(out / "teacher-head" / "model")
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")
    assert "## What each objective is worth" in (out / "study.md").read_text()
    assert not list(out.glob("half-*/checkpoints")), "what is scored keeps its model and its scores alone"
    assert not list(out.glob("*/scores/*/seed-*/*.safetensors"))
    with pytest.raises(
        ValueError, match=r"(?s)study.json holds half-cut, trained with.*optimizer.lr: 0.01 -> 0.02"
    ):
        study.main([*words, "--optimizer.lr=0.02"])
    goes_on_with_study_json_alone(words, out, stages, study_file)


def goes_on_with_study_json_alone(
    words: list[str], out: Path, stages: list[str], before: dict[str, Any]
) -> None:
    """Nothing is trained or scored again; of what is taken out of the records, that alone."""

    def call(records: dict[str, Any], *more: str) -> dict[str, Any]:
        shutil.rmtree(out)
        out.mkdir()
        (out / "study.json").write_text(json.dumps(records))
        stages[:] = ["", ""]  # past the stop
        assert study.main([*words, *more]) == 0
        found: dict[str, Any] = json.loads((out / "study.json").read_text())
        return found

    assert call(before)["models"] == before["models"]
    assert stages == ["", ""]
    partly = json.loads(json.dumps(before))
    partly["models"] = [model for model in partly["models"] if model["name"] != "half-relations"]
    assert [model["name"] for model in call(partly)["models"]][3] == "half-relations"
    assert stages[2:4] == ["pretrain.py", "finetune.py"]
    partly = json.loads(json.dumps(before))
    del partly["models"][0]["scores"]["cola"]
    after = call(partly, "--objectives", "relations")  # the others' records stay
    assert stages[2:] == ["finetune.py"]
    assert {model["name"]: set(model["scores"]) for model in after["models"]} == {
        model["name"]: {"sst2", "cola"} for model in before["models"]
    }
    with pytest.raises(
        ValueError, match=r"(?s)study.json holds .* scored with.*learning_rate: 0.003 -> 0.01"
    ):
        study.main([*words, "--finetune.learning-rate=0.01"])
