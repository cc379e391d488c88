"""A study of some settings, as launch/study.py plans it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.common.cli import parse_config
from launch.experiments.study_results import Scores, StudiedModel
from launch.experiments.study_runs import OBJECTIVES, Scale, Study, students_of

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
        parameters=1_234_567,
        tokens=tokens,
        tokens_per_s=100.0,
        scores=scores,
    )
