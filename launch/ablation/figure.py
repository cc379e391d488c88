"""The ablation's figure: one panel for each score, one point for each variant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.ablation.table import METRICS, Ablation, Result, is_alike, is_full
from launch.ablation.variants import FULL, REPEAT

LOG_ABOVE = 5.0
"""Largest KL over smallest, above which its axis is logarithmic."""


def plot(ablation: Ablation, out: Path) -> None:
    """One panel for each score, a point for each variant, the range of the full recipe's seeds as a band; PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {"heldout_kl": "KL to the teacher (nats), lower is better"}
    titles["heldout_top1_agreement"] = "top-1 agreement with the teacher (%)"
    titles["heldout_mlm_loss"] = "MLM loss (nats), lower is better"
    if ablation.tasks:
        titles["mean"] = f"mean of {', '.join(ablation.tasks)} (points)"
    shown = [result for result in ablation.results if not result.name.startswith(REPEAT)]
    figure, panels = pyplot.subplots(
        1, len(titles), figsize=(1.6 + 3.7 * len(titles), 1.6 + 0.42 * len(shown)), sharey=True
    )
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        _plot_panel(axes, ablation, shown, key)
        axes.set_xlabel(title)
    panels[0].set_yticks(range(len(shown)), [result.name for result in shown])
    figure.suptitle(f"Ablation. {ablation.scale}", fontsize=11)
    legend = "hollow: no further from the full recipe than its own seeds are from each other (grey band)"
    figure.text(0.5, 0.01, legend if ablation.noise() else "one seed each", ha="center", fontsize=9)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


def _plot_panel(axes: Any, ablation: Ablation, shown: Sequence[Result], key: str) -> None:
    full = [
        values[key]
        for result in ablation.results
        if is_full(result) and key in (values := ablation.values(result))
    ]
    style = METRICS[key][1] if key in METRICS else ".1f"
    axes.axvspan(min(full), max(full), color="0.85", zorder=0)
    axes.axvline(full[0], color="0.45", linewidth=1, zorder=1)
    if key in ablation.teacher:
        teacher = ablation.teacher[key] * METRICS[key][2]
        axes.axvline(teacher, color="tab:orange", linestyle="--", linewidth=1, label="teacher")
        axes.legend(loc="lower right", fontsize=8)
    for row, result in enumerate(shown):
        if (value := ablation.values(result).get(key)) is None:
            continue
        differences, is_reference = ablation.differences(result), result.name == FULL
        hollow = not is_reference and is_alike(differences, ablation.noise(), key)
        color = "black" if is_reference else "tab:blue"
        axes.plot(value, row, "o", color=color, markerfacecolor="white" if hollow else color, zorder=3)
        label = format(value, style) if is_reference else f"{differences[key]:+{style}}"
        place = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 8}
        place["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        axes.annotate(label, (value, row), (0, 6), **place)
    shown_values = [ablation.values(result)[key] for result in shown if key in ablation.values(result)]
    if key == "heldout_kl" and max(shown_values) > LOG_ABOVE * min(shown_values) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    axes.margins(x=0.18)
    axes.set_ylim(len(shown) - 0.5, -0.8)
    axes.grid(axis="x", alpha=0.3)
