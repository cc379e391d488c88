"""Which runs a study consists of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.common.cli import parse_config
from launch.experiments.study_runs import HEAD, OBJECTIVES, Scale, chosen, students_of
from tests.unit.launch.experiments.given import BUDGET, SHARED, STEP, planned
from train.errors import UserError


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


def test_unknown_names_are_refused_with_those_there_are() -> None:
    with pytest.raises(
        UserError, match=r"--objectives kd: there is no such; there are triple, relations, hidden, both"
    ):
        chosen(["kd"], OBJECTIVES, "--objectives")
