"""study.json of launch/study.py, and the tables and sentences that are made from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pydantic import Field

from launch.common.figure_files import Figures
from launch.common.tables import DASH, Column, Table
from train.finetuning.tasks import title_of

CONTROL, CUT = "control", "cut"
EQUAL_TIME = "-equal-time"


class Scores(Figures):
    """One task: points of 0 to 100, by fine-tuning seed."""

    seeds: list[float]
    """Of seed 0, 1, ..."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Of launch/finetune.py."""
    made: dict[str, str] = Field(default_factory=dict)
    """Date, commit and hardware."""

    @property
    def median(self) -> float:
        return statistics.median(self.seeds)

    @property
    def spread(self) -> float:
        """Highest less lowest."""
        return max(self.seeds) - min(self.seeds)


class StudiedModel(Figures):
    """The teacher, or a student after one run."""

    name: str
    title: str
    student: str = ""
    """Its shape; empty for the teacher."""
    objective: str = ""
    """"cut" for the untrained one; empty for the teacher."""
    parameters: int
    changed: str = ""
    """The flags of launch/pretrain.py that made it."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What its training depends on: launch/experiments/study_records.py."""
    made: dict[str, str] = Field(default_factory=dict)
    """Date, commit and hardware of its training; empty where its folder does not say."""
    tokens: int = 0
    tokens_per_s: float | None = None
    heldout_before: dict[str, float] = Field(default_factory=dict)
    heldout: dict[str, float] = Field(default_factory=dict)
    scores: dict[str, Scores] = Field(default_factory=dict)


class TriedRate(Figures):
    """One short run of the search for a learning rate."""

    objective: str
    rate: float
    key: str
    """Of the held-out row."""
    heldout: float
    chosen: bool
    settings: dict[str, Any] = Field(default_factory=dict)
    """As a model's."""


class StudyFile(Figures):
    """Everything that a study has found so far."""

    teacher: str
    tasks: list[str]
    budget: int
    """Tokens of each run."""
    finetuning: str
    """The flags of launch/finetune.py, the same for all."""
    models: list[StudiedModel]
    """The teacher first."""
    rates: list[TriedRate] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)

    @cached_property
    def reference(self) -> StudiedModel:
        return self.models[0]

    def others(self, student: str, objective: str) -> list[StudiedModel]:
        """The models of one shape and objective, fewest tokens first."""
        found = [each for each in self.models if (each.student, each.objective) == (student, objective)]
        return sorted(found, key=lambda each: each.tokens)

    def at_budget(self, student: str, objective: str) -> StudiedModel | None:
        """The one that was trained for the study's tokens, or not at all where that is what it is."""
        found = [each for each in self.others(student, objective) if each.name == f"{student}-{objective}"]
        return found[0] if found else None

    @property
    def students(self) -> list[str]:
        return list(dict.fromkeys(each.student for each in self.models if each.student))

    @cached_property
    def common(self) -> list[str]:
        """The tasks that every model has which has any: those of the means."""
        scored = [each.scores for each in self.models if each.scores]
        return [task for task in self.tasks if all(task in scores for scores in scored)]

    def mean(self, model: StudiedModel) -> float | None:
        """Of the medians of the common tasks; None where the model, or the study, has none."""
        if not self.common or not model.scores:
            return None
        return statistics.fmean(model.scores[task].median for task in self.common)

    def retention(self, model: StudiedModel) -> float | None:
        """The model's mean score as a share of the teacher's."""
        own, theirs = self.mean(model), self.mean(self.reference)
        return None if own is None or not theirs else own / theirs


def scores_table(study: StudyFile) -> Table:
    """Every model on every task."""
    first = [Column("model", is_number=False), Column("parameters")]
    columns = [*first, *(Column(title_of(task)) for task in study.tasks), Column("mean"), Column("kept")]
    rows = [
        [
            model.name,
            f"{model.parameters / 1e6:.1f}M",
            *(_score(model.scores.get(task)) for task in study.tasks),
            _points(study.mean(model)),
            _share(study.retention(model)),
        ]
        for model in study.models
    ]
    common = ", ".join(map(title_of, study.common)) or "none"
    kinds: dict[tuple[str, str], str] = {}
    for each in study.models:  # other budgets have the same title
        kinds.setdefault((each.student, each.objective), f"{each.name}: {each.title}")
    seeds = max((len(found.seeds) for each in study.models for found in each.scores.values()), default=0)
    notes = [
        f"Dev sets, points of 100; median of {seeds} fine-tuning seeds, lowest and highest in brackets. "
        f"Fine-tuned with {study.finetuning or 'the published settings'}.",
        f"Mean: of {'all tasks' if study.common == study.tasks else common}. Kept: its share of the teacher's.",
        *kinds.values(),
    ]
    return Table("What each objective is worth", columns, rows, notes)


def verdict_table(study: StudyFile) -> Table:
    """Each trained student against the untrained cut and against the control of its shape."""
    columns = [
        Column("model", is_number=False),
        Column("tokens"),
        Column("tokens/s"),
        Column("mean"),
        Column("distance from cut\nto teacher closed"),
        Column("above control by more\nthan the seeds' spread", is_number=False),
    ]
    rows = []
    for student in study.students:
        base, rival = study.at_budget(student, CUT), study.at_budget(student, CONTROL)
        for model in study.models:
            if model.student == student and model.objective not in (CUT, CONTROL):
                rows.append(
                    [
                        model.name,
                        f"{model.tokens:,}",
                        DASH if model.tokens_per_s is None else f"{model.tokens_per_s:,.0f}",
                        _points(study.mean(model)),
                        _share(_closed(study, base, model)),
                        _above(model, rival, study.tasks),
                    ]
                )
    return Table("Against the untrained cut and the control", columns, rows)


def curve_table(study: StudyFile) -> Table | None:
    """What a longer run gains; None where no objective was trained for several budgets."""
    rows = []
    for student in study.students:
        for objective in dict.fromkeys(each.objective for each in study.models if each.student == student):
            points = curve_points(study, student, objective)
            if len(points) > 2:
                rows += [
                    [
                        f"{student}, {objective}",
                        f"{each.tokens:,}",
                        _points(study.mean(each)),
                        _share(kept),
                    ]
                    for each, kept in points
                ]
    columns = [Column("student", is_number=False), Column("tokens"), Column("mean"), Column("kept")]
    return Table("Longer training", columns, rows) if rows else None


def curve_points(study: StudyFile, student: str, objective: str) -> list[tuple[StudiedModel, float | None]]:
    """(model, retention) by tokens, from the untrained cut on; runs of equal time are no point of it."""
    found = [each for each in study.others(student, objective) if not each.name.endswith(EQUAL_TIME)]
    return [(each, study.retention(each)) for each in [*study.others(student, CUT), *found]]


def rates_table(study: StudyFile) -> Table | None:
    """The search for learning rates; None where there was none."""
    if not study.rates:
        return None
    columns = [
        Column("objective", is_number=False),
        Column("learning rate"),
        Column("held-out"),
        Column("chosen"),
    ]
    rows = [
        [each.objective, f"{each.rate:g}", f"{each.heldout:.4f} ({each.key})", "yes" if each.chosen else ""]
        for each in study.rates
    ]
    return Table("Learning rates, chosen on held-out loss", columns, rows)


def tables_of(study: StudyFile) -> list[Table]:
    """All that there are."""
    found = [
        scores_table(study),
        verdict_table(study),
        curve_table(study),
        rates_table(study),
    ]
    return [table for table in found if table is not None and table.rows]


def _closed(study: StudyFile, cut: StudiedModel | None, model: StudiedModel) -> float | None:
    """How much of the distance between the cut and the teacher a student has made up."""
    means = [None if each is None else study.mean(each) for each in (cut, model, study.reference)]
    low, own, high = means
    if low is None or own is None or high is None or high <= low:
        return None
    return (own - low) / (high - low)


def _above(model: StudiedModel, control: StudiedModel | None, tasks: Sequence[str]) -> str:
    """ "5 of 6; not RTE": where the medians differ by more than either's seeds do."""
    common = [task for task in tasks if control and task in control.scores and task in model.scores]
    if not common or control is None:
        return DASH
    missed = [
        title_of(task)
        for task in common
        if model.scores[task].median - control.scores[task].median
        <= max(model.scores[task].spread, control.scores[task].spread)
    ]
    return f"{len(common) - len(missed)} of {len(common)}" + (f"; not {', '.join(missed)}" if missed else "")


def _score(scores: Scores | None) -> str:
    if scores is None:
        return DASH
    text = f"{scores.median:.1f}"
    return f"{text} ({min(scores.seeds):.1f} to {max(scores.seeds):.1f})" if len(scores.seeds) > 1 else text


def _points(value: float | None) -> str:
    return DASH if value is None else f"{value:.1f}"


def _share(value: float | None) -> str:
    return DASH if value is None else f"{value:.1%}"
