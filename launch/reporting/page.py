"""The report as one self-contained HTML page and as Markdown, from the same words."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup

from launch.ablation.table import SMALL_CORPUS, SMALL_STUDENT
from launch.reporting import published
from launch.reporting.chart import NUM_STYLES, line_chart
from launch.reporting.inputs import InferenceFile, ModelScores
from launch.reporting.runs import Curve, RunFacts, teacher_loss
from launch.reporting.tables import Column, Table

TITLE = "Distillation report"
TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Report:
    """All that the page says."""

    scale: str
    tables: Sequence[Table]
    versions: Mapping[str, str]
    curves: Sequence[Curve] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    """What is missing -> the command that makes it."""


def scale_sentence(
    runs: Sequence[RunFacts], models: Sequence[ModelScores], speeds: InferenceFile | None
) -> str:
    """How large our models and runs are, so that no figure of ours is taken for one of the paper's."""
    own: list[str] = []
    smallest, tokens = [], []
    for run in runs:
        teacher = f"its teacher {run.teacher_parameters:,}" if run.teacher_parameters else "no teacher"
        where = f"{run.num_processes} process{'es' if run.num_processes > 1 else ''}"
        on = {"CPU": " on CPU", "GPU": " on GPU"}.get(run.device, f", {run.device}")
        own.append(
            f"{run.name} has {run.student_parameters:,} parameters ({teacher}), "
            f"trained on {run.tokens:,} tokens by {where}{on}"
        )
        smallest.append(run.student_parameters)
        tokens.append(run.tokens)
    if not runs:
        sizes = {model.name: model.parameters for model in models}
        sizes |= {model.name: model.parameters for model in speeds.models} if speeds else {}
        own = [f"{name} has {count:,} parameters" for name, count in sizes.items()]
        smallest = list(sizes.values())
    is_small = (smallest and min(smallest) < SMALL_STUDENT) or (tokens and min(tokens) < SMALL_CORPUS)
    first = "SMALL SCALE, not the paper's. " if is_small else ""
    told = f"{'; '.join(own)}. " if own else ""
    theirs = [published.PARAMETERS[name] // 10**6 for name in (published.STUDENT, published.TEACHER)]
    return (
        f"{first}{told}The paper's student has {theirs[0]} million parameters, its teacher {theirs[1]} million; its "
        "corpus was English Wikipedia and the Toronto Book Corpus. Columns headed "
        f"“{published.LABEL}” are copied from the paper; all others are ours"
        f"{' and say nothing about models of that size' if is_small else ''}."
    )


def as_html(report: Report) -> str:
    """One page that needs nothing but itself."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    lines = [curve for curve in report.curves if curve.heldout or curve.training]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=TITLE,
        label=published.LABEL,
        source=published.SOURCE,
        scale=report.scale,
        tables=report.tables,
        charts=_charts(lines),
        curve_names=[curve.name for curve in lines],
        has_teacher_line=teacher_loss(lines) is not None,
        left_out=report.left_out,
        versions=report.versions,
        num_styles=NUM_STYLES,
        classes=_classes,
    )


def _charts(curves: Sequence[Curve]) -> list[Markup]:
    teacher = teacher_loss(curves)
    line = None if teacher is None else ("teacher, finished", teacher)
    words = ("tokens seen (millions)", "MLM loss (nats per masked token)")
    millions = [
        {curve.name: [(tokens / 1e6, loss) for tokens, loss in points] for curve, points in of}
        for of in (
            [(curve, curve.heldout) for curve in curves],
            [(curve, curve.training) for curve in curves],
        )
    ]
    charts = [
        line_chart("Held-out windows", *words, millions[0], line),
        line_chart("Training batches", *words, millions[1]),
    ]
    return [chart for chart in charts if chart]


def _classes(table: Table, index: int) -> str:
    """Of a cell of the `index`-th column."""
    column: Column = table.columns[index]
    found = [] if column.is_number else ["words"]
    if column.group == published.LABEL:
        found.append("published")
    if column.group and column.group != table.columns[index - 1].group:
        found.append("first")
    return " ".join(found)


def as_markdown(report: Report) -> str:
    """The same words for a README or a wiki; curves as the picture beside it."""
    parts = [f"# {TITLE}", "", f"**{_plain(report.scale)}**"]
    for number, table in enumerate(report.tables):
        parts += ["", f"## {_plain(table.title)}", ""]
        headings = [
            f"{column.group}: {column.heading}" if column.group and column.heading else column.heading
            for column in table.columns
        ]
        parts += [_line(headings), "|" + "".join("---:|" if c.is_number else "---|" for c in table.columns)]
        parts += [_line(row) for row in table.rows]
        parts += ["", *(f"* {_plain(note)}" for note in table.notes)] if table.notes else []
        if number == 0 and report.curves:
            parts += ["", "![MLM loss of each run over its tokens](loss.png)"]
    if report.left_out:
        parts += ["", "## Left out", ""]
        parts += [f"* {_plain(what)}: `{command}`" for what, command in report.left_out.items()]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return (
        "\n".join([*parts, "", f"Published figures: {published.SOURCE}. Made with {_plain(versions)}."])
        + "\n"
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_plain, cells)) + " |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no HTML, no emphasis, no new cell or line."""
    escaped = re.sub(r"([\\`*_\[\]|~])", r"\\\1", " ".join(text.split()))
    return html.escape(escaped, quote=False)
