"""A study's stages, what its file remembers, what its command refuses; tests/end_to_end/test_study.py runs one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from launch import study
from launch.experiments import study_records
from launch.experiments.job import Finetuning, Job
from launch.experiments.options import checked_finetuning, split_words
from launch.experiments.study import StudyJob, spelled_flags
from launch.experiments.study_records import Records
from launch.experiments.study_results import (
    TriedRate,
)
from launch.experiments.study_runs import OBJECTIVES
from launch.experiments.variant import Variant
from tests.tiny_tasks import save_encoder, write_sst2
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


def test_a_choice_stands_when_a_rate_that_failed_has_a_figure_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was trained at the rate chosen before could not go on."""
    found = planned(rates=(0.001, 0.002))
    runs = found.search(found.run(found.students[0], OBJECTIVES[0]))
    records = recorded(tmp_path)
    settings = {"of": runs[0].name}
    chosen = TriedRate(
        objective="triple", rate=0.001, key="heldout_kl", heldout=0.5, chosen=True, settings=settings
    )
    records.rates = [chosen]
    (tmp_path / runs[1].name).mkdir(parents=True)
    (tmp_path / runs[1].name / "summary.json").write_text('{"heldout": {"heldout_kl": 0.25}}')
    monkeypatch.setattr(StudyJob, "train", lambda self, runs: None)
    monkeypatch.setattr(StudyJob, "save", lambda self: None)
    monkeypatch.setattr(StudyJob, "settings", lambda self, run: {"of": run.name})
    made = StudyJob(job_of(tmp_path), found, records)
    assert made.best_rate("triple", runs, "heldout_kl") == 0.001
    assert [(each.rate, each.chosen) for each in made.rates] == [(0.001, True), (0.002, False)]


def test_a_job_of_an_array_trains_its_own_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs at one search run would each count what the other holds as failed."""
    trained: list[str] = []
    monkeypatch.setattr(StudyJob, "train", lambda self, runs: trained.extend(run.name for run in runs))
    monkeypatch.setattr(StudyJob, "train_and_score", lambda self, run: trained.append(run.variant.name))
    monkeypatch.setattr(StudyJob, "settings", lambda self, run: {"of": run.name})
    monkeypatch.setattr("launch.experiments.study.is_finished", lambda run: (run / "summary.json").exists())
    search = "search/half-relations/lr-0.001"
    for only, needed in (
        ("half-cut", ""),
        (search, ""),
        ("half-relations", search),
        ("half-triple", "search/teacher-head/lr-0.001"),
    ):
        trained.clear()
        job = StudyJob(job_of(tmp_path), planned(), recorded(tmp_path), only)
        if needed:
            first = "teacher-head" if "head" in needed else needed
            with pytest.raises(
                UserError,
                match=rf"--only {only} needs {needed}, which is not finished: --only {first} before it",
            ):
                job.run()
            assert trained == []
        else:
            assert job.run() == 0
            assert trained == [only]
    for rate, value in ((0.001, 0.5), (0.003, 0.25)):
        folder = tmp_path / f"search/half-relations/lr-{rate:g}"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"heldout": {"heldout_relation": value}}))
    job = StudyJob(job_of(tmp_path), planned(), recorded(tmp_path), "half-relations")
    assert job.run() == 0
    assert job.made[0].variant.changes["optimizer.lr"] == 0.003
    assert trained[-1] == "half-relations"


def test_the_cut_of_a_recipe_without_relations() -> None:
    found = planned(words=["--objective.relation_weight=0"])
    changes = found.cut(found.students[0]).changes
    assert changes["training.max_steps"] == 0
    assert "objective.kd_weight" not in changes  # the recipe's own


def test_a_task_may_have_settings_of_its_own(
    teacher_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sst2(tmp_path, 8, 4)
    (tmp_path / "imdb").mkdir()
    rows = [json.dumps({"id": f"{number}", "text": "words", "label": number % 2}) for number in range(60)]
    (tmp_path / "imdb" / "train.jsonl").write_text("\n".join(rows))
    mine = tmp_path / "mine.csv"
    mine.write_text("text,topic\n" + "".join(f"words {number},{number % 2}\n" for number in range(60)))
    flags = ["--finetune.imdb.max-length=16", "--finetune.epochs=2", "--finetune.imdb.epochs=1"]
    _, own = split_words([*flags, "--finetune.label=topic", "--finetune.mine.batch-size=4"], [])
    found, settings = checked_finetuning(
        ["sst2", "imdb", f"csv:{mine}"], [f"--data={tmp_path}"], own, teacher_folder
    )
    assert {task: (each["epochs"], each["max_length"]) for task, each in settings.items()} == {
        "sst2": (2.0, 128),
        "imdb": (1.0, 16),
        "mine": (2.0, 128),
    }
    data = f"--data={tmp_path}"
    commands: list[list[str]] = []
    monkeypatch.setattr(Job, "_run", lambda self, command: commands.append(command[2:]) or 0)
    replace(job_of(tmp_path), finetuning={**found, "rte": replace(found["sst2"], task="rte")}).finetune(
        {"a": "folder"}
    )
    where = ["--model", "folder", "--out", str(tmp_path / "a" / "scores")]
    assert commands == [
        [data, "--epochs=2", "--task", "sst2", "rte", *where],
        [data, "--epochs=2", "--max-length=16", "--epochs=1", "--task", "imdb", *where],
        ["--epochs=2", "--label=topic", "--batch-size=4", "--task", f"csv:{mine}", *where],
    ]
    del found["mine"]
    assert spelled_flags(found) == f"{data} --epochs=2; imdb: --max-length=16 --epochs=1"


def test_tasks_of_ones_own_that_are_ambiguous(teacher_folder: str, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.csv").write_text("text,label\na,0\nb,1\n")
    names = [f"csv:{tmp_path}/{folder}/x.csv" for folder in ("a", "b")]
    with pytest.raises(UserError, match=r"b/x\.csv: there is a task named x already; rename the file"):
        checked_finetuning(names, [], [], teacher_folder)
    with pytest.raises(UserError, match="--label is about one --task of your own"):
        checked_finetuning(["sst2"], [f"--data={tmp_path}"], ["--label=topic"], teacher_folder)


def test_tasks_that_the_data_lack_are_left_out_where_none_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sst2(tmp_path, 8, 4)
    data, model = [f"--data={tmp_path}"], save_encoder(tmp_path / "model")
    found, _ = checked_finetuning(study.TASKS, data, [], model, all_needed=False)
    assert [*found] == ["sst2"]
    said = capsys.readouterr().out
    assert all(f"{task} is left out: no " in said for task in study.TASKS if task != "sst2")
    with pytest.raises(UserError, match="no questions of SQuAD"):
        checked_finetuning(["sst2", "squad"], data, [], model)


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
        (["--finetune.epochs", "1"], "--finetune.epochs 1: give --finetune.epochs=1"),
        (
            ["--finetune.seeds=1"],
            "--finetune.seeds has no effect here: this command says it itself; remove it",
        ),
        (["--finetune.sst2.task=rte"], "--finetune.task has no effect here"),
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
        job = StudyJob(
            replace(job_of(tmp_path), finetuning={"sst2": Finetuning("sst2", ())}),
            found,
            recorded(tmp_path),
            only,
        )
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
