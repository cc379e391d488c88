"""The ablation's results side by side: differences to the full recipe, how large chance is, the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launch.ablation.variants import ADAMW, FULL, PUBLISHED, REPEAT
from launch.common.tables import Column, Table
from train.evaluation.masking import LABEL
from train.finetuning.results import macro_average

METRICS = {
    "heldout_kl": ("KL\n(nats)", ".4f", 1.0),
    "heldout_top1_agreement": ("agreement\n(%)", ".1f", 100.0),
    "heldout_mlm_loss": ("MLM loss\n(nats)", ".4f", 1.0),
    "heldout_accuracy": ("accuracy\n(%)", ".1f", 100.0),
}
"""Key of a held-out row -> (heading, format, factor)."""
TASK_STYLE = ".1f"
SMALL_STUDENT, SMALL_CORPUS = 50_000_000, 1_000_000_000
ALIKE = "~"
PUBLISHED_NOTE = (
    "the paper's column: GLUE points lost in Sanh et al. 2019, table 4 (DistilBERT-base from BERT-base, Wikipedia and "
    "the Toronto Book Corpus); not measured here, another scale and another score"
)


@dataclass(frozen=True)
class Result:
    """A finished variant."""

    name: str
    changed: str
    heldout: dict[str, float]
    """Held-out scores under the keys of metrics.jsonl: losses in nats, the others as shares."""
    tokens_per_s: float | None
    """None where the run's rows are gone."""
    scores: dict[str, float] = field(default_factory=dict)
    """{task: median score over the fine-tuning seeds}, points of 100."""

    @property
    def is_full(self) -> bool:
        """Whether this is the full recipe, with whatever seed."""
        return self.name == FULL or self.name.startswith(REPEAT)

    @property
    def glue(self) -> float | None:
        """Mean of the GLUE tasks' scores."""
        return macro_average(self.scores)


@dataclass(frozen=True)
class Scale:
    """How large the experiment was."""

    student_parameters: int
    teacher_parameters: int
    steps: int
    tokens: int

    @property
    def is_small(self) -> bool:
        """Whether it is far from the published one (66M parameters, a corpus of billions of tokens)."""
        return self.student_parameters < SMALL_STUDENT or self.tokens < SMALL_CORPUS

    def __str__(self) -> str:
        sizes = (
            f"student of {_millions(self.student_parameters)} parameters, teacher of "
            f"{_millions(self.teacher_parameters)}; {self.steps:,} steps, {_millions(self.tokens)} tokens each"
        )
        return f"SMALL SCALE: {sizes}" if self.is_small else sizes


@dataclass(frozen=True)
class Score:
    """One score of a variant, in the units of the table."""

    value: float
    difference: float
    """To the full recipe."""
    is_alike: bool
    """Whether the difference is no larger than those between the full recipe's own seeds."""


@dataclass(frozen=True)
class Ablation:
    """Everything the table and the figure need."""

    results: Sequence[Result]
    """The full recipe among them."""
    scale: Scale
    masking: str = ""
    """Of the held-out scores, in words."""
    teacher: Mapping[str, float] = field(default_factory=dict)
    """The teacher's own held-out scores under the same keys, as far as they are known."""
    finetuning_seeds: int = 0
    failed: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def full(self) -> Result:
        return next(result for result in self.results if result.name == FULL)

    @property
    def tasks(self) -> list[str]:
        """Tasks that the full recipe has been scored on."""
        return list(self.full.scores)

    def values(self, result: Result) -> dict[str, float]:
        """The scores of a variant in the units of the table; a task on which it failed is missing, and the mean."""
        found = {key: result.heldout[key] * factor for key, (_, _, factor) in METRICS.items()}
        found |= {task: result.scores[task] for task in self.tasks if task in result.scores}
        if self.tasks and set(self.tasks) <= set(result.scores):
            found["mean"] = sum(result.scores[task] for task in self.tasks) / len(self.tasks)
        return found

    def scores(self, result: Result) -> dict[str, Score]:
        """The same beside the full recipe's."""
        full, noise = self.values(self.full), self.noise() or {}
        found = {}
        for key, value in self.values(result).items():
            difference = value - full[key]
            is_alike = not result.is_full and key in noise and abs(difference) <= noise[key]
            found[key] = Score(value, difference, is_alike)
        return found

    def noise(self) -> dict[str, float] | None:
        """The largest difference between two seeds of the full recipe; None where there is one seed only."""
        repeats = [self.values(result) for result in self.results if result.is_full]
        if len(repeats) < 2:
            return None
        return {
            key: max(values[key] for values in repeats) - min(values[key] for values in repeats)
            for key in repeats[0]
            if all(key in values for values in repeats)
        }


def as_json(ablation: Ablation) -> dict[str, Any]:
    """What ablation.json holds."""
    variants = [
        {
            "name": result.name,
            "changed": result.changed,
            "heldout": result.heldout,
            "scores": result.scores,
            "glue": result.glue,
            "tokens_per_s": result.tokens_per_s,
            "difference": {key: score.difference for key, score in ablation.scores(result).items()},
            "published_glue_difference": PUBLISHED.get(result.name),
        }
        for result in ablation.results
    ]
    return {
        "scale": {**asdict(ablation.scale), "small": ablation.scale.is_small},
        "variants": variants,
        LABEL: ablation.masking,
        "noise": ablation.noise(),
        "teacher": dict(ablation.teacher),
        "finetuning_seeds": ablation.finetuning_seeds,
        "failed": dict(ablation.failed),
        "left_out": dict(ablation.left_out),
        "published": PUBLISHED_NOTE,
    }


def as_text(ablation: Ablation) -> str:
    """The tables for a terminal."""
    columns = [Column("variant", is_number=False)]
    for heading, _, _ in METRICS.values():
        columns += [Column(heading, group=heading), Column("to full", group=heading)]
    rows = [
        [
            result.name,
            *(text for cell in _cells(ablation, result, METRICS) for text in cell),
            _published(result),
        ]
        for result in ablation.results
    ]
    paper = Column("paper\n(GLUE)")
    title = f"Held-out masked tokens, the same for all ({ablation.masking}). {ablation.scale}"
    parts = [Table(title, [*columns, paper], rows).as_text()]
    if tasks := _task_columns(ablation):
        columns = [Column("variant", is_number=False), *map(Column, tasks), paper]
        rows = [
            [result.name, *("\n".join(cell) for cell in _cells(ablation, result, tasks)), _published(result)]
            for result in ablation.results
        ]
        title = f"Fine-tuned; below, the difference to full. {ablation.scale}"
        parts.append(Table(title, columns, rows).as_text())
    return "\n".join([*parts, *notes(ablation)])


def as_markdown(ablation: Ablation) -> str:
    """The same for a document, with what each variant changes."""
    parts = [
        "# Ablation",
        f"{ablation.scale}. Held-out scores: {ablation.masking}.",
        "![held-out scores of the variants](ablation.png)",
    ]
    heldout = {key: heading for key, (heading, _, _) in METRICS.items()}
    for headings in (heldout, {task: task for task in _task_columns(ablation)}):
        if not headings:
            continue
        columns = [Column("variant", is_number=False), Column("changed", is_number=False)]
        columns += [*map(Column, headings.values()), Column("published (GLUE points)")]
        rows = []
        for result in ablation.results:
            cells = [
                f"{value} ({to_full})" if to_full else value
                for value, to_full in _cells(ablation, result, headings)
            ]
            rows.append([result.name, f"`{result.changed}`", *cells, _published(result)])
        parts.append(Table("", columns, rows).as_markdown())
    return "\n\n".join([*parts, "\n".join(f"* {note}" for note in notes(ablation))]) + "\n"


def notes(ablation: Ablation) -> list[str]:
    """What a reader of the table must know."""
    lines = []
    if ablation.noise() is None:
        lines.append("one seed of the full recipe: how large chance is, is not known (--full-seeds 3 tells)")
    else:
        count = sum(result.is_full for result in ablation.results)
        lines.append(
            f"{ALIKE} not larger than the largest difference between {count} seeds of the full recipe: may be chance"
        )
    rates = [result.changed for result in ablation.results if result.name.startswith(ADAMW)]
    but = f", but for {' and '.join(rates)}" if rates else ""
    lines.append(f"all variants: same seed, data order, steps and learning rate{but}; one run each")
    if ablation.teacher:
        scores = ", ".join(_teacher_score(key, value) for key, value in ablation.teacher.items())
        lines.append(f"the teacher itself, on the same masked tokens: {scores}")
    if ablation.tasks:
        lines.append(f"tasks: median of {ablation.finetuning_seeds} fine-tuning seeds, points of 100")
    lines.append(PUBLISHED_NOTE)
    lines += [f"left out: {name}: {reason}" for name, reason in ablation.left_out.items()]
    lines += [f"FAILED: {name}: {reason}" for name, reason in ablation.failed.items()]
    return lines


def style_of(key: str) -> str:
    """The format of a score."""
    return METRICS[key][1] if key in METRICS else TASK_STYLE


def _cells(
    ablation: Ablation, result: Result, keys: Sequence[str] | Mapping[str, Any]
) -> list[tuple[str, str]]:
    """(value, difference to the full recipe) of each score; the second is empty for the full recipe itself."""
    scores, found = ablation.scores(result), []
    for key in keys:
        if key not in scores:
            found.append(("missing", ""))
            continue
        score, style = scores[key], style_of(key)
        difference = f"{score.difference:+{style}}{f' {ALIKE}' if score.is_alike else ''}"
        found.append((f"{score.value:{style}}", "" if result.name == FULL else difference))
    return found


def _task_columns(ablation: Ablation) -> list[str]:
    return [*ablation.tasks, "mean"] if ablation.tasks else []


def _published(result: Result) -> str:
    return f"{PUBLISHED[result.name]:+.2f}" if result.name in PUBLISHED else ""


def _teacher_score(key: str, value: float) -> str:
    heading, style, factor = METRICS[key]
    name, unit = heading.split("\n")
    return f"{name} {value * factor:{style}} {unit.strip('()')}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f}M" if count < 10**7 else f"{count / 1e6:,.0f}M"
