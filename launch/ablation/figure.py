"""The ablation's figure: one panel for each score, one point for each variant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.ablation.table import METRICS, Ablation, Result, Score, style_of
from launch.ablation.variants import FULL, REPEAT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_ABOVE = 5.0
"""Largest KL over smallest, above which its axis is logarithmic."""


def plot(ablation: Ablation, out: Path) -> None:
    """One panel for each score, a point for each variant, the range of the full recipe's seeds as a band; PNG."""
    from matplotlib.figure import Figure  # slow to import, and --help needs none of it

    titles = {
        "heldout_kl": "KL to the teacher (nats), lower is better",
        "heldout_top1_agreement": "top-1 agreement with the teacher (%)",
        "heldout_mlm_loss": "MLM loss (nats), lower is better",
    }
    if ablation.tasks:
        titles["mean"] = f"mean of {', '.join(ablation.tasks)} (points)"
    shown = [result for result in ablation.results if not result.name.startswith(REPEAT)]
    figure = Figure(figsize=(1.6 + 3.7 * len(titles), 1.6 + 0.42 * len(shown)))
    panels = figure.subplots(1, len(titles), sharey=True)
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        _draw_references(axes, ablation, key)
        _draw_variants(axes, ablation, shown, key)
        axes.set_xlabel(title)
    panels[0].set_yticks(range(len(shown)), [result.name for result in shown])
    figure.suptitle(f"Ablation. {ablation.scale}. Held-out: {ablation.masking}", fontsize=11)
    legend = "hollow: no further from the full recipe than its own seeds are from each other (grey band)"
    legend = legend if ablation.noise() else "one seed each"
    legend += "; dashed: the teacher itself" if ablation.teacher else ""
    figure.text(0.5, 0.01, legend, ha="center", fontsize=9)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(out, dpi=130)


def _draw_references(axes: Axes, ablation: Ablation, key: str) -> None:
    """The full recipe and its seeds; the teacher."""
    repeats = [ablation.values(result) for result in ablation.results if result.is_full]
    full = [values[key] for values in repeats if key in values]
    axes.axvspan(min(full), max(full), color="0.85", zorder=0)
    axes.axvline(full[0], color="0.45", linewidth=1, zorder=1)
    if key in ablation.teacher:
        teacher = ablation.teacher[key] * METRICS[key][2]
        axes.axvline(teacher, color="tab:orange", linestyle="--", linewidth=1)


def _draw_variants(axes: Axes, ablation: Ablation, shown: Sequence[Result], key: str) -> None:
    scores = {row: ablation.scores(result).get(key) for row, result in enumerate(shown)}
    found: dict[int, Score] = {row: score for row, score in scores.items() if score is not None}
    for row, score in found.items():
        is_reference = shown[row].name == FULL
        color = "black" if is_reference else "tab:blue"
        axes.plot(score.value, row, "o", color=color, mfc="white" if score.is_alike else color, zorder=3)
        style = style_of(key)
        axes.annotate(
            f"{score.value:{style}}" if is_reference else f"{score.difference:+{style}}",
            (score.value, row),
            (0, 6),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
        )
    values = [score.value for score in found.values()]
    if key == "heldout_kl" and max(values) > LOG_ABOVE * min(values) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.margins(x=0.18)
    axes.set_ylim(len(shown) - 0.5, -0.8)
    axes.grid(axis="x", alpha=0.3)
