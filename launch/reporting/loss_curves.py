"""MLM losses of runs over their tokens: read from metrics.jsonl, drawn as loss.png and as the page's charts."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from train.evaluation.masking import label_of_row, training_label
from train.loop.metrics import read_rows
from train.run_folder import recorded_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]
HELDOUT, TRAINING = "Held-out windows", "Training batches"
X_LABEL, Y_LABEL = "tokens seen (millions)", "MLM loss (nats per masked token)"
COLORS = {
    "text": ("#1c2128", "#e4e8ed"),
    "quiet": ("#57606a", "#9aa4af"),
    "line": ("#d0d7de", "#39424d"),
    "c0": ("#0b62b0", "#6cb2f5"),
    "c1": ("#b3470a", "#f3935a"),
    "c2": ("#1a7446", "#5fce93"),
    "c3": ("#7b3fa0", "#c697ec"),
    "c4": ("#a3244c", "#f07fa3"),
    "c5": ("#5b6310", "#c6cf62"),
    "c6": ("#0a7480", "#5fcbd8"),
    "c7": ("#5a4a42", "#c9b3a7"),
}
"""CSS variable of the page -> its value in light and in dark mode."""
TEXT, QUIET, LINE, *SERIES = (light for light, _ in COLORS.values())
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))


@dataclass(frozen=True)
class Losses:
    """A run's losses on one split under one masking."""

    split: str
    masking: str
    """In words; only losses of equal ones share an axis."""
    points: Sequence[Point]
    """(tokens, nats per masked token)."""
    teacher_loss: float | None = None

    @property
    def title(self) -> str:
        return f"{self.split}: {self.masking}"


@dataclass(frozen=True)
class Curve:
    """A run's losses over its tokens."""

    name: str
    losses: Sequence[Losses]


@dataclass(frozen=True)
class Panel:
    """One chart: losses that may be compared."""

    title: str
    lines: dict[int, Sequence[Point]]
    """By the number of the curve."""
    marker: str
    teacher_loss: float | None
    """A line across: of the first run which has a teacher."""


def read_curve(run_dir: Path) -> Curve:
    """Losses that are numbers; a row whose loss overflowed has no point."""
    rows, config = read_rows(run_dir), recorded_config(run_dir)
    tokens_at = {row["step"]: row["tokens"] for row in rows if _finite(row.get("tokens"))} | {0: 0}
    heldout: dict[str, list[Point]] = {}
    teacher: dict[str, float] = {}
    for row in rows:
        if _finite(row.get("heldout_mlm_loss")) and row["step"] in tokens_at:
            masking = label_of_row(row, config)
            point = (float(tokens_at[row["step"]]), row["heldout_mlm_loss"])
            heldout.setdefault(masking, []).append(point)
            if _finite(row.get("teacher_heldout_mlm_loss")):
                teacher.setdefault(masking, row["teacher_heldout_mlm_loss"])
    training = [
        (float(tokens_at[row["step"]]), row["loss_mlm"])
        for row in rows
        if _finite(row.get("loss_mlm")) and row["step"] in tokens_at
    ]
    losses = [Losses(HELDOUT, masking, points, teacher.get(masking)) for masking, points in heldout.items()]
    if training:
        losses.append(Losses(TRAINING, training_label(config), training))
    return Curve(run_dir.name, losses)


def plot_losses(curves: Sequence[Curve], out: Path) -> None:
    """Every panel, two side by side, as a PNG."""
    import matplotlib  # slow to import, and --help needs none of it
    from matplotlib.figure import Figure

    panels = panels_of(curves)
    num_rows = max(1, -(-len(panels) // 2))
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(11, 4.5 * num_rows), layout="constrained")
        places = figure.subplots(num_rows, 2, squeeze=False).flat
        lines: dict[str, Any] = {}
        for axes, panel in itertools.zip_longest(places, panels):
            if panel is None:
                axes.set_axis_off()
            else:
                lines |= _draw(axes, panel, curves)
        _legend(figure, lines, num_columns=4)
        figure.savefig(out, dpi=130)


def svg_charts(curves: Sequence[Curve]) -> list[Markup]:
    """The same as an <svg> for each panel, to stand in the page; always the same for equal curves.

    Colours are variables of the page's style sheet, and text is text.
    """
    panels = panels_of(curves)
    if not panels:
        return []
    import matplotlib
    from matplotlib.figure import Figure

    charts = []
    for panel in panels:
        settings = {
            "svg.fonttype": "none",
            "svg.hashsalt": panel.title,
            "text.parse_math": False,
            "font.size": 11,
        }
        with matplotlib.rc_context(settings):
            figure = Figure(figsize=(5.4, 3.7 + 0.12 * len(curves)), layout="constrained")
            _legend(figure, _draw(figure.subplots(), panel, curves), num_columns=2)
            text = io.StringIO()
            no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
        names = ", ".join(curves[number].name for number in panel.lines)
        label = f"{panel.title}: {Y_LABEL} over {X_LABEL}; lines: {names}"
        charts.append(_inline(text.getvalue(), label))
    return charts


def panels_of(curves: Sequence[Curve]) -> list[Panel]:
    """Held-out losses, then training losses, a panel for each masking: figures of other masks or lengths never share
    an axis."""
    kinds = {(each.split, each.title): each for curve in curves for each in curve.losses if each.points}
    panels = []
    for split, title in sorted(kinds, key=lambda kind: kind[0] != HELDOUT):
        lines = {
            number: each.points
            for number, curve in enumerate(curves)
            for each in curve.losses
            if each.title == title and each.points
        }
        teachers = (each.teacher_loss for curve in curves for each in curve.losses if each.title == title)
        teacher_loss = next((loss for loss in teachers if loss is not None), None)
        panels.append(Panel(title, lines, "." if split == HELDOUT else "", teacher_loss))
    return panels


def _draw(axes: Axes, panel: Panel, curves: Sequence[Curve]) -> dict[str, Any]:
    """Draw a panel; its lines by name, for the legend."""
    lines = {}
    for number, points in panel.lines.items():
        xs, ys = [x / 1e6 for x, _ in points], [y for _, y in points]
        color, dashes = SERIES[number % len(SERIES)], DASHES[number % len(DASHES)]
        (lines[curves[number].name],) = axes.plot(xs, ys, marker=panel.marker, color=color, linestyle=dashes)
    if panel.teacher_loss is not None:
        lines["teacher, finished"] = axes.axhline(
            panel.teacher_loss, color=QUIET, linestyle="--", linewidth=1
        )
    axes.set_title(panel.title, loc="left", color=TEXT, fontsize="medium", wrap=True)
    axes.set_xlabel(X_LABEL, color=TEXT)
    axes.set_ylabel(Y_LABEL, color=TEXT)
    axes.tick_params(color=QUIET, labelcolor=TEXT)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_color(QUIET)
    axes.spines[["top", "right"]].set_visible(False)
    return lines


def _legend(figure: Figure, lines: dict[str, Any], num_columns: int) -> None:
    figure.legend(
        list(lines.values()),
        list(lines),
        loc="outside lower left",
        ncols=num_columns if max(map(len, lines)) < 24 else 1,
        labelcolor=TEXT,
        frameon=False,
    )


def _inline(svg: str, label: str) -> Markup:
    """An SVG file's text as an element of a page that may hold others."""
    svg = svg[svg.index("<svg ") + len("<svg ") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # "axes_1" and the like, which every figure has
    svg = re.sub(r"font-family: [^;]*; ", "", svg)  # the page's
    for name, (light, _) in COLORS.items():
        svg = svg.replace(f": {light}", f": var(--{name})")
    return Markup('<svg role="img" aria-label="{}" ').format(label) + Markup(svg)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
