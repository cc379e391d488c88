"""Which runs a study of one teacher consists of: every objective on every student, at equal tokens and equal time.

Pure: sizes in, names and configuration changes out. launch/study.py trains them in this order, and
launch/experiments/study_results.py puts their scores side by side.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.experiments.objective_changes import terms_alone
from launch.experiments.study_results import CONTROL, CUT
from launch.experiments.variant import Variant
from train.config import Config
from train.config_sections.model import OF_TEACHERS, ModelConfig
from train.config_sections.objective import OBJECTIVE_WEIGHTS
from train.errors import UserError
from train.run_folder import MODEL

HEAD = "teacher-head"
SEARCH_SHARE = 4
"""A learning rate is tried for this part of the budget."""


@dataclass(frozen=True)
class Objective:
    """What a student is trained with."""

    name: str
    title: str
    terms: Collection[str]
    """Of the recipe's, in which relations have a weight too."""
    selects: str
    """Key of the held-out row by which its learning rate is chosen: the lowest."""
    random: bool = False
    """Whether it begins with random weights."""
    needs_head: bool = False
    """Whether it learns from the teacher's logits, or is a masked language model itself."""
    curve: bool = False
    """Whether it is trained for every budget of the curve."""

    def is_on(self, recipe: Config) -> bool:
        """Whether the recipe has one of its terms at all."""
        return any(getattr(recipe.objective, term) for term in self.terms)


MLM, RELATIONS = ("mlm_weight",), ("relation_weight",)
HIDDEN = ("cosine_weight", "layer_cosine_weight")
PUBLISHED = [name for name in OBJECTIVE_WEIGHTS if name not in RELATIONS]
OBJECTIVES = (
    Objective(
        "triple",
        "soft targets, MLM and cosine (the published loss)",
        PUBLISHED,
        "heldout_kl",
        needs_head=True,
        curve=True,
    ),
    Objective(
        "relations", "relations alone, from the teacher as it is", RELATIONS, "heldout_relation", curve=True
    ),
    Objective(
        "hidden", "cosine of the hidden states alone, from the teacher as it is", HIDDEN, "heldout_cos"
    ),
    Objective("both", "the published loss and relations", OBJECTIVE_WEIGHTS, "heldout_kl", needs_head=True),
    Objective(
        CONTROL,
        "MLM alone, from random weights: no teacher",
        MLM,
        "heldout_mlm_loss",
        random=True,
        needs_head=True,
    ),
    Objective(
        "relations-random", "relations alone, from random weights", RELATIONS, "heldout_relation", random=True
    ),
)


@dataclass(frozen=True)
class Student:
    """A shape."""

    name: str
    title: str
    changes: Mapping[str, Any]


def students_of(layers: int, width: int, heads: int) -> list[Student]:
    """Half the depth; and two thirds of depth and width, in whole heads.

    Args:
        layers, width, heads: the teacher's.
    """
    half, narrow = max(1, layers // 2), max(1, round(layers * 2 / 3))
    kept = width // heads * max(1, round(heads * 2 / 3))
    return [
        Student("half", f"{half} layers, width {width}", {"model.student_layers": half}),
        Student(
            "narrow",
            f"{narrow} layers, width {kept}",
            {"model.student_layers": narrow, "model.student_width": kept},
        ),
    ]


@dataclass(frozen=True)
class Scale:
    """How long everything is trained."""

    budget: int
    """Tokens of each run."""
    curve: Sequence[int]
    """Tokens of the curve's runs."""
    tokens_per_step: int

    def steps(self, tokens: int) -> int:
        """Optimizer steps for that many tokens."""
        return max(1, round(tokens / self.tokens_per_step))


@dataclass(frozen=True)
class StudyRun:
    """A run, and where its scores belong."""

    variant: Variant
    student: str
    objective: str


@dataclass(frozen=True)
class Study:
    """What a study trains, in stages: each needs what the stages before it have found.

    Args:
        has_head: whether the teacher is a masked language model already.
        recipe: what all runs share, relations among its terms.
    """

    teacher: str
    has_head: bool
    out: Path
    scale: Scale
    students: Sequence[Student]
    objectives: Sequence[Objective]
    rates: Sequence[float]
    recipe: Config
    layer_map: str = "every_other"

    @property
    def needs_head(self) -> bool:
        """Whether the teacher must get a head first."""
        return not self.has_head and any(objective.needs_head for objective in self.objectives)

    def head(self, rate: float | None = None) -> Variant:
        """Continued pretraining of the teacher, with a new head."""
        changes = {
            **{f"model.{name}": getattr(ModelConfig, name) for name in OF_TEACHERS},
            "model.teacher": None,
            "model.start_from": self.teacher,
            "model.new_head": True,
            **terms_alone(self.recipe, MLM),
            **self._length(rate, None),
        }
        title = "the teacher gets an MLM head by continued pretraining"
        return Variant(HEAD, title, changes, is_required=True)

    def search(self, made: Variant) -> list[Variant]:
        """A run with each learning rate; none where there is only one to try."""
        if len(self.rates) < 2:
            return []
        return [
            replace(
                made,
                name=f"search/{made.name}/lr-{rate:g}",
                title=f"{made.title}: learning rate {rate:g}",
                changes={
                    **made.changes,
                    **self._length(rate, self.scale.budget // SEARCH_SHARE),
                },
            )
            for rate in self.rates
        ]

    def cut(self, student: Student) -> Variant:
        """The student as it was made: the teacher's layers, untrained."""
        relations = next(each for each in OBJECTIVES if each.name == "relations")
        scored = relations if relations.is_on(self.recipe) else replace(self.objectives[0], random=False)
        made = self.run(student, scored, self.rates[0])
        return replace(
            made,
            name=f"{student.name}-{CUT}",
            title=f"the untrained cut, {student.title}",
            changes={**made.changes, "training.max_steps": 0},
        )

    def run(
        self,
        student: Student,
        objective: Objective,
        rate: float | None = None,
        tokens: int | None = None,
        suffix: str = "",
    ) -> Variant:
        """One student with one objective.

        Args:
            tokens: None for the budget.
        """
        teacher = str(self.out / HEAD / MODEL) if objective.needs_head and not self.has_head else self.teacher
        recipe, cosines = self.recipe.objective, set(HIDDEN) & set(objective.terms)
        width = student.changes.get("model.student_width")
        projects = width is not None and any(getattr(recipe, name) for name in cosines)
        heads_fit = width is None or recipe.relation_heads is None or width % recipe.relation_heads == 0
        changes = {
            "model.teacher": teacher,
            "model.layer_map": "random" if objective.random else self.layer_map,
            **student.changes,
            **terms_alone(self.recipe, objective.terms),
            **({"objective.projection": True} if projects else {}),
            **({} if heads_fit else {"objective.relation_heads": None}),
            **self._length(rate, tokens),
        }
        return Variant(
            f"{student.name}-{objective.name}{suffix}", f"{objective.title}, {student.title}", changes
        )

    def runs(self, rates: Mapping[str, float]) -> list[StudyRun]:
        """By shape the cut and every objective; then the curve, the first shape at every other budget, each run with a
        schedule of its own.

        Args:
            rates: learning rates by the objective's name.
        """
        found = []
        for student in self.students:
            found.append(StudyRun(self.cut(student), student.name, CUT))
            for each in self.objectives:
                run = self.run(student, each, rates[each.name])
                found.append(StudyRun(run, student.name, each.name))
        first, steps = self.students[0], self.scale.steps
        by_steps = {steps(tokens): tokens for tokens in self.scale.curve}  # equal ones are one run
        others = [tokens for number, tokens in by_steps.items() if number != steps(self.scale.budget)]
        for each in self.objectives:
            for tokens in others if each.curve else ():
                run = self.run(first, each, rates[each.name], tokens, f"-{spelled_tokens(tokens)}")
                found.append(StudyRun(run, first.name, each.name))
        return found

    def searches(self) -> list[StudyRun]:
        """The runs that learning rates are chosen by, but for the head's."""
        first = self.students[0]
        return [
            StudyRun(run, first.name, each.name)
            for each in self.objectives
            for run in self.search(self.run(first, each, self.rates[0]))
        ]

    def listed(self) -> list[Variant]:
        """All runs but those of equal time, which the speeds of others decide; at the first learning rate."""
        rate = self.rates[0]
        head = [*self.search(self.head(rate)), self.head(rate)] if self.needs_head else []
        rates = {each.name: rate for each in self.objectives}
        return [*head, *(run.variant for run in [*self.searches(), *self.runs(rates)])]

    def _length(self, rate: float | None, tokens: int | None) -> dict[str, Any]:
        steps = self.scale.steps(self.scale.budget if tokens is None else tokens)
        return {
            "training.max_steps": steps,
            "evaluation.every_steps": steps,
            **({} if rate is None else {"optimizer.lr": rate}),
        }


def spelled_tokens(tokens: int) -> str:
    """500000 as "0.5M", for names of runs."""
    return f"{tokens / 1e6:g}M"


def chosen(names: Sequence[str] | None, known: Sequence[Any], flag: str) -> list[Any]:
    """Those of these names, in their own order; all where none are named.

    Raises:
        UserError: an unknown name.
    """
    by_name = {each.name: each for each in known}
    for name in names or []:
        if name not in by_name:
            raise UserError(f"{flag} {name}: there is no such; there are {', '.join(by_name)}")
    return [each for each in known if names is None or each.name in names]
