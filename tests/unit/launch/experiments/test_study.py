"""A study's stages, what its file remembers, what its command refuses; tests/end_to_end/test_study.py runs one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from launch import study
from launch.experiments import study_records
from launch.experiments.job import Job
from launch.experiments.options import checked_finetuning, split_words
from launch.experiments.study import StudyJob, spelled_flags
from launch.experiments.study_records import Records
from launch.experiments.study_results import (
    TriedRate,
)
from launch.experiments.study_runs import OBJECTIVES
from launch.experiments.variant import Variant
from tests.tiny_tasks import write_sst2
from tests.unit.launch.experiments.given import SHARED, model, planned
from train.errors import UserError
from train.finetuning.results import write_scores


def recorded(out: Path) -> Records:
    return Records.read(out, {}, 1, {"encoder": "digest"})


def job_of(out: Path) -> Job:
    return Job(out, [], list, {}, {}, 1)


def test_a_rate_is_chosen_among_those_that_have_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = planned(rates=(0.001, 0.002, 0.003, 0.004))
    runs = found.search(found.run(found.students[0], OBJECTIVES[0]))
    for run, value in zip(runs, (float("nan"), 0.75, 0.5, None), strict=True):
        (tmp_path / run.name).mkdir(parents=True)
        (tmp_path / run.name / "summary.json").write_text(json.dumps({"heldout": {"heldout_kl": value}}))
    monkeypatch.setattr(StudyJob, "train", lambda self, runs: None)
    job = job_of(tmp_path)
    monkeypatch.setattr(StudyJob, "save", lambda self: None)
    monkeypatch.setattr(StudyJob, "settings", lambda self, run: {"name": run.name})
    assert StudyJob(job, found, recorded(tmp_path)).best_rate("triple", runs, "heldout_kl") == 0.003
    assert job.failed == {run.name: "its heldout_kl is no number" for run in (runs[0], runs[3])}


def test_the_run_that_a_setting_does_not_go_with_is_named(tmp_path: Path) -> None:
    job = replace(job_of(tmp_path), words=["--objective.relation_heads=4"])
    with pytest.raises(UserError, match=r"^half-triple: objective.relation_heads=4: has no effect"):
        job.config_of(planned().run(planned().students[0], OBJECTIVES[0]))


def test_a_run_that_is_none_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--only half-kd: no such run; there are teacher-head, half-cut, half-triple"
    ):
        StudyJob(job_of(tmp_path), planned(), recorded(tmp_path), "half-kd").run()


def test_the_teachers_head_alone_for_an_array_of_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    monkeypatch.setattr(StudyJob, "train", lambda self, runs: trained.extend(run.name for run in runs))
    monkeypatch.setattr(StudyJob, "settings", lambda self, run: {"of": run.name})
    made = StudyJob(job_of(tmp_path), planned(rates=(0.001,)), recorded(tmp_path), "teacher-head")
    assert made.run() == 0
    assert trained == ["teacher-head"]
    assert not (tmp_path / "study.json").exists()


def test_a_recorded_rate_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(rates=(0.001, 0.002))
    runs = found.search(found.run(found.students[0], OBJECTIVES[0]))
    records = recorded(tmp_path)
    records.rates = [
        TriedRate(
            objective="triple",
            rate=rate,
            key="heldout_kl",
            heldout=value,
            chosen=False,
            settings={"of": run.name},
        )
        for run, rate, value in zip(runs, found.rates, (0.5, 0.25), strict=True)
    ]
    monkeypatch.setattr(StudyJob, "train", lambda self, runs: pytest.fail("trained"))
    monkeypatch.setattr(StudyJob, "save", lambda self: None)
    monkeypatch.setattr(StudyJob, "settings", lambda self, run: {"of": run.name})
    made = StudyJob(job_of(tmp_path), found, records)
    assert made.best_rate("triple", runs, "heldout_kl") == 0.002
    assert [rate.chosen for rate in made.rates] == [False, True]


def test_a_task_may_have_settings_of_its_own(
    teacher_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sst2(tmp_path, 8, 4)
    (tmp_path / "imdb").mkdir()
    rows = [json.dumps({"id": f"{number}", "text": "words", "label": number % 2}) for number in range(60)]
    (tmp_path / "imdb" / "train.jsonl").write_text("\n".join(rows))
    _, own = split_words(
        ["--finetune.imdb.max-length=16", "--finetune.epochs=2", "--finetune.imdb.epochs=1"], []
    )
    flags, settings = checked_finetuning(["sst2", "imdb"], ["--data", str(tmp_path)], own, teacher_folder)
    assert [(settings[task]["epochs"], settings[task]["max_length"]) for task in ("sst2", "imdb")] == [
        (2.0, 128),
        (1.0, 16),
    ]
    assert spelled_flags(flags) == f"--data {tmp_path} --epochs=2; imdb: --max-length=16 --epochs=1"
    commands: list[list[str]] = []
    monkeypatch.setattr(Job, "_run", lambda self, command: commands.append(command[2:]) or 0)
    replace(job_of(tmp_path), finetuning={**flags, "rte": flags["sst2"]}).finetune({"a": "folder"})
    where = ["--model", "folder", "--out", str(tmp_path / "a" / "scores")]
    assert commands == [
        [*flags["sst2"], "--task", "sst2", "rte", *where],
        [*flags["imdb"], "--task", "imdb", *where],
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget-tokens", "many"], "'many' is no number of tokens; give 4e6"),
        (["--curve", "1e6,-3"], "'-3' is no number of tokens"),
        (["--rates", "0.1,2"], "--rates 2: give learning rates between 0 and 1"),
        (["--seeds", "0"], "--seeds 0: give at least 1"),
        (["--ranks", "0"], "--ranks 0: give at least 1"),
        (["--run.dir=x"], "--run.dir has no effect here"),
        (["--objective.relation_heads=7"], "objective.relation_heads=7 does not divide the widths"),
        (["--model.student_width=16"], "--model.student_width has no effect here: --students says it"),
        (["--training.max_steps", "7"], "--training.max_steps has no effect here: --budget-tokens and"),
        (["--finetune.epoch=1"], "becomes --KEY=VALUE of launch/finetune.py"),
        (["--finetune.sst2.epoch=1"], "becomes --KEY=VALUE of launch/finetune.py: unrecognized .* --epoch=1"),
        (["--finetune.imdb.epochs=1"], "--finetune.imdb.epochs=1 has no effect: imdb is not among .*, sst2"),
    ],
)
def test_refusals(
    flags: list[str], message: str, teacher_folder: str, shards_folder: str, tmp_path: Path
) -> None:
    words = ["--teacher", teacher_folder, "--corpus", shards_folder, "--tasks", str(tmp_path)]
    with pytest.raises(UserError, match=message):
        study.main([*words, "--out", str(tmp_path / "out"), "--score-on", "sst2", *flags])
    assert not (tmp_path / "out").exists()


def test_shards_are_looked_at_before_anything_is_trained(
    teacher_folder: str, shards_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--teacher", teacher_folder, "--tasks", str(write_sst2(tmp_path / "data")), "--score-on", "sst2"]
    words += ["--out", str(tmp_path / "out"), "--rates", "1e-3,0.001", "--corpus"]
    with pytest.raises(UserError, match=r"holds no manifest.json; make shards"):
        study.main([*words, str(tmp_path)])
    with pytest.raises(UserError, match=r"compared on held-out text: .*4096"):
        study.main([*words, shards_folder, "--data.sequence_length=4096"])
    assert not (tmp_path / "out").exists()
    assert study.main([*words, shards_folder, "--list"]) == 0
    assert "search/" not in capsys.readouterr().out  # equal rates are one


def run_of_a_kind(job: StudyJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stages without training or scores."""
    for name in ("train_and_score", "score", "write"):
        monkeypatch.setattr(StudyJob, name, lambda self, *names: "")
    monkeypatch.setattr(StudyJob, "equal_time", lambda self, rates: [])
    job.records.corpus = {"data.shards": "digest"}
    assert job.run() == 0


def test_records_of_another_teacher_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its own, nor those of the students of its head."""
    found = []
    for weights in ("a", "b"):
        records = Records.read(tmp_path, {}, 1, {"encoder": weights})
        job = StudyJob(replace(job_of(tmp_path), words=SHARED), planned(rates=(0.001,)), records)
        run_of_a_kind(job, monkeypatch)
        found.append(
            {run.variant.name: job.settings(run.variant)["model.teacher"] for run in job.made}["half-triple"]
        )
    assert found == [f"teacher-head of {weights}, learning rate 0.001" for weights in ("a", "b")]
    records.models = {"teacher": model("teacher", 80.0).model_copy(update={"settings": {"weights": "a"}})}
    with pytest.raises(UserError, match=r"(?s)study.json holds teacher, .*weights: 'a' -> 'b'"):
        job.run()


def test_figures_keep_the_machine_that_they_were_taken_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call that gathers an array's results runs elsewhere; relations for equal time want one machine."""
    found = planned(has_head=True, rates=(0.001,))

    def train(self: Job, runs: Sequence[Variant]) -> None:
        for run in runs:
            (self.out / run.name / "model").mkdir(parents=True, exist_ok=True)
            (self.out / run.name / "model" / "config.json").write_text("{}")
            figures = {"parameters": {"student": 1}, "tokens": 7, "heldout": {}, "heldout_before": {}}
            figures["tokens_per_s"] = 200 if "relations" in run.name else 100
            (self.out / run.name / "summary.json").write_text(json.dumps(figures))

    def finetune(self: Job, models: Mapping[str, str], tasks: Sequence[str]) -> None:
        for name in models:
            for task in tasks:
                (self.out / name / "scores" / task).mkdir(parents=True, exist_ok=True)
                write_scores(
                    self.out / name / "scores" / task, {"task": task, "settings": {}}, {0: {"score": 5.0}}
                )

    monkeypatch.setattr(Job, "train", train)
    monkeypatch.setattr(Job, "finetune", finetune)
    monkeypatch.setattr(StudyJob, "parameters", 1)
    monkeypatch.setattr(StudyJob, "settings", lambda self, run: {"of": run.name})

    def call(machine: str, only: str | None) -> StudyJob:
        monkeypatch.setattr(study_records, "hardware", lambda device: machine)
        job = StudyJob(replace(job_of(tmp_path), finetuning={"sst2": []}), found, recorded(tmp_path), only)
        assert job.run() == 0
        return job

    call("A", "half-triple")
    call("A", "narrow-triple")
    call("A", "narrow-relations")
    models = {each.name: each for each in call("B", None).result().models}
    machines = {
        name: (each.made.get("hardware"), each.scores["sst2"].made["hardware"])
        for name, each in models.items()
    }
    assert machines["half-triple"] == machines["narrow-relations"] == ("A", "A")
    assert machines["half-relations"] == ("B", "B")
    assert machines["teacher"] == (None, "B")
    assert "narrow-relations-equal-time" in models
    assert "half-relations-equal-time" not in models
    for path in [tmp_path / "study.json", *tmp_path.glob("narrow-*/made.json")]:  # as of older folders
        path.unlink()
    models = {each.name: each for each in call("B", None).result().models}
    assert models["narrow-triple"].made == {}
    assert "narrow-relations-equal-time" not in models
