"""The study's figure: what each student keeps of its teacher, and what longer training gains."""

from __future__ import annotations

from pathlib import Path

from launch.experiments.study_results import CUT, StudyFile, curve_points


def plot(study: StudyFile, out: Path) -> None:
    """Left the mean score of every model, with the teacher's as a line; right the curve over tokens; PNG."""
    from matplotlib.figure import Figure  # slow to import, and --help needs none of it

    models = [each for each in study.models[1:] if study.mean(each) is not None]
    lines = {
        f"{student}, {objective}": points
        for student in study.students
        for objective in dict.fromkeys(each.objective for each in models if each.student == student)
        if len(points := [each for each in curve_points(study, student, objective) if each[1]]) > 2
    }
    figure = Figure(figsize=(13 if lines else 8, 2.2 + 0.35 * len(models)))
    panels = figure.subplots(1, 1 + bool(lines), squeeze=False)[0]
    reference = study.mean(study.reference)
    for row, model in enumerate(models):
        mean = study.mean(model)
        assert mean is not None
        panels[0].plot(mean, row, "o", color="tab:gray" if model.objective == CUT else "tab:blue")
        panels[0].annotate(
            f"{mean:.1f}", (mean, row), (0, 5), textcoords="offset points", ha="center", fontsize=8
        )
    panels[0].set_yticks(range(len(models)), [model.name for model in models])
    panels[0].set_ylim(len(models) - 0.5, -0.8)
    panels[0].set_xlabel(f"mean of {len(study.common)} tasks (points)")
    if reference is not None:
        panels[0].axvline(reference, color="tab:orange", linestyle="--", label=f"teacher: {reference:.1f}")
        panels[0].legend(loc="lower right", fontsize=9)
    if lines:
        for name, points in lines.items():
            panels[1].plot(
                [model.tokens / 1e6 for model, _ in points],
                [100 * kept for _, kept in points if kept is not None],
                marker="o",
                label=name,
            )
        panels[1].set_xlabel("tokens (millions)")
        panels[1].set_ylabel("kept of the teacher's mean (%)")
        panels[1].legend(fontsize=9)
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, dpi=130)
