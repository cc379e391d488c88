"""The ablation's results side by side: differences to the full recipe, how large chance is, the table."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launch.ablation.variants import FULL, PUBLISHED, REPEAT
from launch.text_table import text_table
from train.finetuning.results import macro_average

METRICS = {
    "heldout_kl": ("KL\n(nats)", ".4f", 1.0),
    "heldout_top1_agreement": ("agreement\n(%)", ".1f", 100.0),
    "heldout_mlm_loss": ("MLM loss\n(nats)", ".4f", 1.0),
    "heldout_accuracy": ("accuracy\n(%)", ".1f", 100.0),
}
"""Key of a held-out row -> (heading, format, factor)."""
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
    tokens_per_s: float
    scores: dict[str, float] = field(default_factory=dict)
    """{task: median score over the fine-tuning seeds}, points of 100."""

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
        told = (
            f"student of {_millions(self.student_parameters)} parameters, teacher of "
            f"{_millions(self.teacher_parameters)}; {self.steps:,} steps, {_millions(self.tokens)} tokens each"
        )
        return f"SMALL SCALE: {told}" if self.is_small else told


@dataclass(frozen=True)
class Ablation:
    """Everything the table and the figure need."""

    results: Sequence[Result]
    """The full recipe among them."""
    scale: Scale
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

    def differences(self, result: Result) -> dict[str, float]:
        """Variant minus full recipe, in the units of the table."""
        full = self.values(self.full)
        return {key: value - full[key] for key, value in self.values(result).items() if key in full}

    def noise(self) -> dict[str, float] | None:
        """The largest difference between two seeds of the full recipe; None where there is one seed only."""
        repeats = [self.values(result) for result in self.results if is_full(result)]
        if len(repeats) < 2:
            return None
        return {
            key: max(values[key] for values in repeats) - min(values[key] for values in repeats)
            for key in repeats[0]
            if all(key in values for values in repeats)
        }


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f}M" if count < 10**7 else f"{count / 1e6:,.0f}M"


def is_full(result: Result) -> bool:
    """Whether this is the full recipe, with whatever seed."""
    return result.name == FULL or result.name.startswith(REPEAT)


def as_json(ablation: Ablation) -> dict[str, Any]:
    """What ablation.json holds."""
    return {
        "scale": {**asdict(ablation.scale), "small": ablation.scale.is_small},
        "variants": [
            {
                "name": result.name,
                "changed": result.changed,
                "heldout": result.heldout,
                "scores": result.scores,
                "glue": result.glue,
                "tokens_per_s": result.tokens_per_s,
                "difference": ablation.differences(result),
                "published_glue_difference": PUBLISHED.get(result.name),
            }
            for result in ablation.results
        ],
        "noise": ablation.noise(),
        "teacher": dict(ablation.teacher),
        "finetuning_seeds": ablation.finetuning_seeds,
        "failed": dict(ablation.failed),
        "left_out": dict(ablation.left_out),
        "published": PUBLISHED_NOTE,
    }


def cells(ablation: Ablation, result: Result, styles: Mapping[str, str]) -> list[tuple[str, str]]:
    """(value, difference to the full recipe) of each score; the second is empty for the full recipe itself.

    Args:
        styles: {key of `Ablation.values`: format}.
    """
    noise, found = ablation.noise(), []
    values, differences = ablation.values(result), ablation.differences(result)
    for key, style in styles.items():
        if key not in values:
            found.append(("missing", ""))
            continue
        difference = "" if result.name == FULL else f"{differences[key]:+{style}}"
        if not is_full(result) and is_alike(differences, noise, key):
            difference += f" {ALIKE}"
        found.append((format(values[key], style), difference))
    return found


def _published(result: Result) -> str:
    return f"{PUBLISHED[result.name]:+.2f}" if result.name in PUBLISHED else ""


def _styles(ablation: Ablation) -> tuple[dict[str, str], dict[str, str]]:
    """Of the held-out scores, and of the tasks (empty without any)."""
    heldout = {key: style for key, (_, style, _) in METRICS.items()}
    return heldout, dict.fromkeys([*ablation.tasks, "mean"], ".1f") if ablation.tasks else {}


def is_alike(differences: Mapping[str, float], noise: Mapping[str, float] | None, key: str) -> bool:
    """Whether a difference to the full recipe is no larger than those between its own seeds."""
    return noise is not None and key in noise and abs(differences[key]) <= noise[key]


def notes(ablation: Ablation) -> list[str]:
    """What a reader of the table must know."""
    noise, lines = ablation.noise(), []
    if noise is None:
        lines.append("one seed of the full recipe: how large chance is, is not known (--full-seeds 3 tells)")
    else:
        count = sum(map(is_full, ablation.results))
        lines.append(
            f"{ALIKE} not larger than the largest difference between {count} seeds of the full recipe: may be chance"
        )
    lines.append("all variants: same seed, data order, steps and learning rate; one run each")
    if ablation.teacher:
        told = (
            f"{METRICS[key][0].splitlines()[0]} {_value(ablation.teacher, key)}" for key in ablation.teacher
        )
        lines.append(f"the teacher itself, on the same masked tokens: {', '.join(told)}")
    if ablation.tasks:
        lines.append(f"tasks: median of {ablation.finetuning_seeds} fine-tuning seeds, points of 100")
    lines.append(PUBLISHED_NOTE)
    lines += [f"left out: {name}: {reason}" for name, reason in ablation.left_out.items()]
    lines += [f"FAILED: {name}: {reason}" for name, reason in ablation.failed.items()]
    return lines


def _value(heldout: Mapping[str, float], key: str) -> str:
    heading, style, factor = METRICS[key]
    return f"{heldout[key] * factor:{style}} {heading.split()[-1].strip('()')}"


def as_text(ablation: Ablation) -> str:
    """The table for a terminal."""
    heldout, tasks = _styles(ablation)
    headings = ["variant"]
    for heading, _, _ in METRICS.values():
        headings += [heading, "to full"]
    rows = [
        [result.name, *itertools.chain(*cells(ablation, result, heldout)), _published(result)]
        for result in ablation.results
    ]
    title = f"Held-out masked tokens, the same for all. {ablation.scale}"
    parts = [text_table([*headings, "paper\n(GLUE)"], rows, title=title)]
    if tasks:
        rows = [
            [result.name, *map("\n".join, cells(ablation, result, tasks)), _published(result)]
            for result in ablation.results
        ]
        title = f"Fine-tuned; below, the difference to full. {ablation.scale}"
        parts.append(text_table(["variant", *tasks, "paper\n(GLUE)"], rows, title=title))
    return "\n".join([*parts, *notes(ablation)])


def as_markdown(ablation: Ablation) -> str:
    """The same for a document, with what each variant changes."""
    parts = ["# Ablation", "", f"{ablation.scale}.", "", "![held-out scores of the variants](ablation.png)"]
    heldout, tasks = _styles(ablation)
    names = {key: METRICS[key][0] if key in METRICS else key for key in (*heldout, *tasks)}
    for styles in (heldout, tasks):
        if not styles:
            continue
        columns = ["variant", "changed", *(names[key] for key in styles), "published (GLUE points)"]
        parts += ["", _line(columns), "|---|---|" + "---:|" * (len(columns) - 2)]
        for result in ablation.results:
            scores = [
                f"{value} ({difference})" if difference else value
                for value, difference in cells(ablation, result, styles)
            ]
            parts.append(_line([result.name, f"`{result.changed}`", *scores, _published(result)]))
    return "\n".join([*parts, "", *(f"* {note}" for note in notes(ablation))]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("\n", " ").strip() for cell in cells) + " |"
