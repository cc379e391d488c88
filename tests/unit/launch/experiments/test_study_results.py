"""The tables and the figure of a study, and those of the docs."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import report
from launch.common.tables import DASH
from launch.experiments.study_figure import plot
from launch.experiments.study_results import (
    Scores,
    StudiedModel,
    StudyFile,
    TriedRate,
    curve_points,
    tables_of,
)
from launch.reporting.inputs import read_study
from tests.paths import ROOT
from tests.unit.launch.experiments.given import BUDGET, model
from train.errors import UserError


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
    assert scores.rows[0] == [
        "teacher",
        "1.2M",
        "80.0 (79.5 to 80.5)",
        "80.0 (79.5 to 80.5)",
        "80.0",
        "100.0%",
    ]
    assert scores.rows[2][-2:] == ["77.5", "96.9%"]
    assert [note.partition(":")[0] for note in scores.notes[2:]] == [
        "teacher",
        "half-cut",
        "half-triple",  # once for both budgets
        "half-control",
        "half-relations",
    ]
    by_name = {row[0]: row for row in verdict.rows}
    assert by_name["half-triple"][4:] == [
        "75.0%",
        "0 of 2; not SST-2, RTE",
    ]  # 0.5 points above, seeds 1 apart
    assert by_name["half-relations"][4:] == ["90.0%", "2 of 2"]
    assert [row[1] for row in curve.rows] == ["0", f"{BUDGET // 2:,}", f"{BUDGET:,}"]
    assert rates.rows == [["triple", "0.001", "0.5000 (heldout_kl)", "yes"]]


def test_means_are_of_the_tasks_that_all_have(finished: StudyFile) -> None:
    def scored(each: StudiedModel, rte: float | None) -> StudiedModel:
        scores = {"sst2": each.scores["sst2"], **({} if rte is None else {"rte": Scores(seeds=[rte])})}
        return each.model_copy(update={"scores": scores})

    points = (90.0, None, 50.0, None, 10.0, 20.0)
    models = [scored(each, rte) for each, rte in zip(finished.models, points, strict=True)]
    scores = tables_of(finished.model_copy(update={"models": models}))[0]
    assert scores.rows[1][3:] == [DASH, "70.0", "87.5%"]
    assert scores.rows[2][3:] == ["50.0", "77.5", "96.9%"]
    assert scores.notes[1] == "Mean: of SST-2. Kept: its share of the teacher's."
    assert tables_of(finished)[0].notes[1].startswith("Mean: of all tasks. ")


def test_a_task_of_ones_own_goes_by_its_name(finished: StudyFile) -> None:
    models = [each.model_copy(update={"scores": {"mine": each.scores["sst2"]}}) for each in finished.models]
    own = finished.model_copy(update={"models": models, "tasks": ["mine"]})
    scores, verdict = tables_of(own)[:2]
    assert scores.columns[2].heading == "mine"
    assert verdict.rows[0][-1] == "0 of 1; not mine"


def test_what_is_missing_is_a_dash_and_no_point(finished: StudyFile) -> None:
    bare = finished.models[2].model_copy(update={"scores": {}})
    partly = finished.model_copy(update={"models": [*finished.models[:2], bare]})
    scores, verdict = tables_of(partly)[:2]
    assert scores.rows[2] == ["half-triple", "1.2M", DASH, DASH, DASH, DASH]
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
