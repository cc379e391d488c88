"""MLM losses of runs over their tokens: read from metrics.jsonl, drawn as loss.png and as the page's charts."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from train.loop.metrics import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]
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
class Curve:
    """A run's losses over its tokens."""

    name: str
    heldout: Sequence[Point]
    """(tokens, nats per masked token)."""
    training: Sequence[Point]
    teacher_loss: float | None


@dataclass(frozen=True)
class Panel:
    """One chart: which of a run's losses, and how."""

    title: str
    points: Callable[[Curve], Sequence[Point]]
    marker: str = ""
    teacher_loss: float | None = None
    """A line across."""


def read_curve(run_dir: Path) -> Curve:
    """Losses that are numbers; a row whose loss overflowed has no point."""
    rows = read_rows(run_dir)
    tokens_at = {row["step"]: row["tokens"] for row in rows if _finite(row.get("tokens"))} | {0: 0}
    heldout = [
        (float(tokens_at[row["step"]]), row["heldout_mlm_loss"])
        for row in rows
        if _finite(row.get("heldout_mlm_loss")) and row["step"] in tokens_at
    ]
    training = [
        (float(tokens_at[row["step"]]), row["loss_mlm"])
        for row in rows
        if _finite(row.get("loss_mlm")) and row["step"] in tokens_at
    ]
    teacher = [
        row["teacher_heldout_mlm_loss"] for row in rows if _finite(row.get("teacher_heldout_mlm_loss"))
    ]
    return Curve(run_dir.name, heldout, training, teacher[0] if teacher else None)


def plot_losses(curves: Sequence[Curve], out: Path) -> None:
    """Held-out and training losses side by side, as a PNG."""
    import matplotlib  # slow to import, and --help needs none of it
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        heldout, training = figure.subplots(1, 2, sharey=True)
        lines = _draw(heldout, _panels(curves)[0], curves)
        _draw(training, _panels(curves)[1], curves)
        _legend(figure, lines, num_columns=4)
        figure.savefig(out, dpi=130)


def svg_charts(curves: Sequence[Curve]) -> list[Markup]:
    """The same as an <svg> for each panel that has points, to stand in the page; always the same for equal curves.

    Colours are variables of the page's style sheet, and text is text.
    """
    panels = [panel for panel in _panels(curves) if any(panel.points(curve) for curve in curves)]
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
        label = f"{panel.title}: {Y_LABEL} over {X_LABEL}; lines: {', '.join(curve.name for curve in curves)}"
        charts.append(_inline(text.getvalue(), label))
    return charts


def teacher_loss(curves: Sequence[Curve]) -> float | None:
    """Held-out MLM loss of the teacher that a report names: that of the first run which has one."""
    return next((curve.teacher_loss for curve in curves if curve.teacher_loss is not None), None)


def _panels(curves: Sequence[Curve]) -> tuple[Panel, Panel]:
    return (
        Panel("Held-out windows", lambda curve: curve.heldout, ".", teacher_loss(curves)),
        Panel("Training batches", lambda curve: curve.training),
    )


def _draw(axes: Axes, panel: Panel, curves: Sequence[Curve]) -> dict[str, Any]:
    """Draw a panel; its lines by name, for the legend."""
    lines = {}
    for number, curve in enumerate(curves):
        xs, ys = [x / 1e6 for x, _ in panel.points(curve)], [y for _, y in panel.points(curve)]
        color, dashes = SERIES[number % len(SERIES)], DASHES[number % len(DASHES)]
        (lines[curve.name],) = axes.plot(xs, ys, marker=panel.marker, color=color, linestyle=dashes)
    if panel.teacher_loss is not None:
        lines["teacher, finished"] = axes.axhline(
            panel.teacher_loss, color=QUIET, linestyle="--", linewidth=1
        )
    axes.set_title(panel.title, loc="left", color=TEXT)
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
