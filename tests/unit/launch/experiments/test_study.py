"""The study's plan, its tables, and what its command refuses; tests/end_to_end/test_study.py runs one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from launch import report, study
from launch.cli import parse_config
from launch.experiments import study_records
from launch.experiments.job import Job
from launch.experiments.study import StudyJob
from launch.experiments.study_figure import plot
from launch.experiments.study_records import Records
from launch.experiments.study_results import (
    Scores,
    StudiedModel,
    StudyFile,
    TriedRate,
    curve_points,
    tables_of,
)
from launch.experiments.study_runs import HEAD, OBJECTIVES, Scale, Study, chosen, students_of
from launch.experiments.variant import Variant
from launch.reporting.inputs import read_study
from launch.tables import DASH
from tests.paths import ROOT
from tests.tiny_tasks import write_sst2
from train.errors import UserError
from train.finetuning.results import write_scores

BUDGET, STEP = 4_000_000, 64 * 128


SHARED = ["--model.teacher=encoder", "--model.teacher_dtype=bf16", "--objective.relation_weight=1"]


def planned(
    has_head: bool = False, rates: tuple[float, ...] = (0.001, 0.003), words: Sequence[str] = ()
) -> Study:
    curve = [500_000, 1_000_000, BUDGET]
    recipe = parse_config([*SHARED, *words], "")
    return Study(
        "encoder",
        has_head,
        Path("out"),
        Scale(BUDGET, curve, STEP),
        students_of(6, 384, 12),
        [each for each in OBJECTIVES if each.is_on(recipe)],
        rates,
        recipe,
    )


@pytest.mark.parametrize("has_head", [False, True])
def test_every_run_is_accepted_and_named_once(has_head: bool) -> None:
    found = planned(has_head)
    names = [run.name for run in found.listed()]
    assert len(set(names)) == len(names)
    assert (HEAD in names) is not has_head
    assert {
        "half-cut",
        "half-triple",
        "narrow-control",
        "half-relations-0.5M",
        "search/half-both/lr-0.003",
    } <= set(names)
    assert not any(name.endswith("-4M") for name in names)  # that is half-triple itself
    for run in found.listed():
        config = parse_config([*SHARED, *run.words], "")
        tokens = {"half-cut": 0, "narrow-cut": 0, "half-relations-0.5M": 500_000}.get(run.name, BUDGET)
        tokens = BUDGET // 4 if run.name.startswith("search/") else tokens
        if "-1M" not in run.name and "-0.5M" not in run.name:
            assert config.training.max_steps == round(tokens / STEP), run.name
        needs_head = config.objective.needs_masks and run.name.removeprefix("search/").split("/")[0] != HEAD
        assert (config.model.teacher == "out/teacher-head/model") is (needs_head and not has_head), run.name
        if config.model.student_width is not None:  # a cosine of other widths needs one
            assert config.objective.projection is config.objective.needs_hidden, run.name


def test_runs_that_come_to_the_same_are_one() -> None:
    scale = Scale(BUDGET, [BUDGET // 4, BUDGET // 4, BUDGET // 4 + 1], STEP)
    names = [run.name for run in replace(planned(), scale=scale).listed()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "words",
    [
        ["--objective.relation_heads=4", "--objective.relation_layers=[[1,1]]", "--objective.temperature=3"],
        ["--objective.kd_positions=masked", "--masking.probability=0.3", "--masking.smoothing=0"],
        ["--objective.mse_weight=1", "--objective.kd_weight=0", "--objective.projection=true"],
        [
            "--objective.layer_cosine_weight=1",
            "--objective.layer_pairs=[[1,2]]",
            "--objective.cosine_weight=0",
        ],
        ["--objective.cosine_weight=0"],
        ["--optimizer.name=adamw", "--optimizer.lr=0.001"],
    ],
)
def test_settings_of_one_term_reach_the_runs_that_have_it(words: list[str]) -> None:
    """And no run is refused for a setting that is idle there."""
    settings = dict(word.removeprefix("--").split("=") for word in words)
    for run in planned(words=words).listed():
        config = parse_config([*SHARED, *words, *run.words], "")
        objective, name = config.objective, run.name.removeprefix("search/").split("/")[0]
        terms = {each for each, weight in objective.term_weights().items() if weight}
        if name in ("half-cut", "half-relations", "narrow-relations-random"):
            assert terms == {"loss_relation"}
            assert objective.relation_heads == (4 if "objective.relation_heads" in settings else None)
        elif name in (HEAD, "half-control"):
            assert terms == {"loss_mlm"}
        elif name in ("half-triple", "half-both"):
            assert ("loss_relation" in terms) is (name == "half-both")
            assert config.masking.probability == float(settings.get("masking.probability", 0.15))
        has_cosine = bool(terms & {"loss_cos", "loss_layer_cos"})
        if config.model.student_width is not None:  # a cosine of other widths needs one
            assert objective.projection is has_cosine


def test_students_begin_with_the_layers_that_are_asked_for() -> None:
    runs = {run.name: run.changes for run in replace(planned(), layer_map="last_of_each").listed()}
    assert runs["half-cut"]["model.layer_map"] == runs["narrow-triple"]["model.layer_map"] == "last_of_each"
    assert runs["half-control"]["model.layer_map"] == "random"


def test_shapes_are_whole_heads() -> None:
    half, narrow = students_of(6, 384, 12)
    assert half.changes == {"model.student_layers": 3}
    assert narrow.changes == {"model.student_layers": 4, "model.student_width": 256}
    assert students_of(1, 32, 1)[1].changes == {"model.student_layers": 1, "model.student_width": 32}


def test_relation_heads_that_do_not_divide_the_narrow_width_are_those_of_the_others() -> None:
    """12 divide the teacher's 384 and not 256."""
    words = ["--objective.relation_heads=12"]
    for run in planned(words=words).listed():
        config = parse_config([*SHARED, *words, *run.words], "")
        if config.objective.relation_weight > 0:
            assert config.objective.relation_heads == (None if config.model.student_width else 12), run.name


def test_one_rate_needs_no_search() -> None:
    assert not any(run.name.startswith("search/") for run in planned(rates=(0.001,)).listed())


def recorded(out: Path) -> Records:
    return Records.read(out, {}, 1, {"encoder": "digest"})


def job_of(out: Path) -> Job:
    return Job(out, [], list, {}, [], [], 1)


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


def model(name: str, points: float, *, tokens: int = BUDGET, spread: float = 1.0) -> StudiedModel:
    student, _, objective = name.partition("-")
    scores = {
        task: Scores(seeds=[points - spread / 2, points, points + spread / 2]) for task in ("sst2", "rte")
    }
    return StudiedModel(
        name=name if tokens in (0, BUDGET) else f"{name}-x",
        title=name,
        student=student if objective else "",
        objective=objective,
        parameters=10,
        tokens=tokens,
        tokens_per_s=100.0,
        scores=scores,
    )


@pytest.fixture
def finished() -> StudyFile:
    models = [
        model("teacher", 80.0, tokens=0),
        model("half-cut", 70.0, tokens=0),
        model("half-triple", 77.5),
        model("half-triple", 75.0, tokens=BUDGET // 2),
        model("half-control", 77.0),
        model("half-relations", 79.0),
    ]
    rates = [TriedRate(objective="triple", rate=0.001, key="heldout_kl", heldout=0.5, chosen=True)]
    return StudyFile(
        teacher="t", tasks=["sst2", "rte"], budget=BUDGET, finetuning="--seeds 3", models=models, rates=rates
    )


def test_tables(finished: StudyFile) -> None:
    scores, verdict, curve, rates = tables_of(finished)
    assert scores.rows[0] == ["teacher", "80.0 (79.5 to 80.5)", "80.0 (79.5 to 80.5)", "80.0", "100.0%"]
    assert scores.rows[2][-2:] == ["77.5", "96.9%"]
    by_name = {row[0]: row for row in verdict.rows}
    assert by_name["half-triple"][4:] == [
        "75.0%",
        "0 of 2; not SST-2, RTE",
    ]  # 0.5 points above, seeds 1 apart
    assert by_name["half-relations"][4:] == ["90.0%", "2 of 2"]
    assert [row[1] for row in curve.rows] == ["0", f"{BUDGET // 2:,}", f"{BUDGET:,}"]
    assert rates.rows == [["triple", "0.001", "0.5000 (heldout_kl)", "yes"]]


def test_what_is_missing_is_a_dash_and_no_point(finished: StudyFile) -> None:
    bare = finished.models[2].model_copy(update={"scores": {}})
    partly = finished.model_copy(update={"models": [*finished.models[:2], bare]})
    scores, verdict = tables_of(partly)[:2]
    assert scores.rows[2] == ["half-triple", DASH, DASH, DASH, DASH]
    assert verdict.rows[0][3:] == [DASH, DASH, DASH]
    assert curve_points(partly, "half", "triple")[-1][1] is None


def test_figure_and_report(finished: StudyFile, tmp_path: Path) -> None:
    plot(finished, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    path = tmp_path / "study.json"
    path.write_text(finished.model_dump_json())
    assert report.main(["--study", str(path), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.md").read_text()
    assert "What each objective is worth" in page
    assert "| half-relations | 4,000,000 | 100 | 79.0 | 90.0% | 2 of 2 |" in page
    path.write_text(path.read_text().replace("80.0", "null", 1))
    with pytest.raises(UserError, match=r"study.json: models.0.scores.sst2.seeds.* is None, no number"):
        report.main(["--study", str(path), "--out", str(tmp_path / "report")])


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "study").glob("*.json")), ids=lambda path: path.stem)
def test_the_tables_of_the_page_are_those_of_its_figures(path: Path) -> None:
    page = (ROOT / "docs" / "STUDY.md").read_text()
    assert path.name in page
    for table in tables_of(read_study(path)):
        assert table.as_markdown() in page, (
            f"launch/report.py --study {path} makes another table: {table.title}"
        )


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


def test_unknown_names_are_refused_with_those_there_are() -> None:
    with pytest.raises(
        UserError, match=r"--objectives kd: there is no such; there are triple, relations, hidden, both"
    ):
        chosen(["kd"], OBJECTIVES, "--objectives")


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
        job = StudyJob(replace(job_of(tmp_path), tasks=["sst2"]), found, recorded(tmp_path), only)
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
