"""Loss curves: which losses share an axis, and how they are drawn."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import launch.report
from launch.report import main
from launch.reporting.comparison import ComparedModel
from launch.reporting.loss_curves import (
    COLORS,
    HELDOUT,
    TRAINING,
    Curve,
    Losses,
    panels_of,
    plot_losses,
    read_curve,
    svg_charts,
)
from tests.unit.launch.reporting.given import MASKED, NASTY, plain


def test_a_run_without_mlm_losses_has_no_plot(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_folder / "metrics.jsonl").write_text('{"step": 0, "heldout_relation": 0.5}\n')
    student = ComparedModel("student", 66_000, None, None, None, None, 1234.4, None, relation=0.25)
    monkeypatch.setattr(launch.report, "compare_runs", lambda runs: [student])
    assert main([str(run_folder), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out/loss.png").exists()
    assert "loss curves" not in (tmp_path / "out/report.txt").read_text()
    assert "loss.png" not in (tmp_path / "out/report.md").read_text()


def test_curves_leave_out_what_is_no_number(run_folder: Path) -> None:
    heldout, training = read_curve(run_folder).losses
    assert heldout.points == [(0.0, 5.5), (8000.0, 4.75)]
    assert training.points == [(4000.0, 5.25)]
    assert heldout.teacher_loss == 4.5


def test_losses_of_other_masks_or_lengths_never_share_an_axis(run_folder: Path, tmp_path: Path) -> None:
    """A run of this version beside one of an older, whose held-out masks were those it trained with; and a run that
    went on from the older version to this one."""
    config = {"masking": {"probability": 0.15, "smoothing": 0.7, "whole_word": False}}
    config |= {"data": {"seed": 0, "sequence_length": 128}, "schedule": {"short_sequence_length": None}}
    (run_folder / "config.yaml").write_text(json.dumps(config))
    old = read_curve(run_folder)
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "heldout_mlm_loss": 4.25, "heldout_masking": MASKED}) + "\n")
    panels = panels_of([old, read_curve(run_folder)])
    assert [(panel.title, list(panel.lines), panel.teacher_loss) for panel in panels] == [
        ("Held-out windows: 15 % of 128 tokens, by count**-0.7", [0, 1], 4.5),
        (f"Held-out windows: {MASKED}", [1], None),
        ("Training batches: 15 % of 128 tokens, by count**-0.7", [0, 1], None),
    ]
    assert panels[1].lines[1] == [(8000.0, 4.25)]
    plot_losses([old, read_curve(run_folder)], tmp_path / "loss.png")
    assert len(svg_charts([old, read_curve(run_folder)])) == 3


def test_one_teacher_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In loss.png and in the page: that of the first run that has a teacher, whose students the table compares."""
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(
        Axes, "axhline", lambda axes, level, **style: drawn.append(level) or axes.plot([], **style)[0]
    )
    points = [(1.0, 3.0)]
    curves = [
        Curve(str(loss), [Losses(HELDOUT, "", points, loss), Losses(TRAINING, "", points)])
        for loss in (None, 1.5, 2.5)
    ]
    plot_losses(curves, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    svg_charts(curves)
    assert drawn == [1.5, 1.5]
    assert panels_of(curves[:1])[0].teacher_loss is None


def test_charts_are_the_same_each_time_and_take_the_page_s_colours() -> None:
    """The names of runs are text, whatever matplotlib or HTML would see in them."""
    names = ["_hidden", "$x^2$", NASTY]
    curves = [Curve(name, [Losses(HELDOUT, "", [(1.0, 3.0), (2.0, 2.0)])]) for name in names]
    (chart,) = svg_charts(curves)  # no training losses: no second chart
    assert svg_charts(curves) == [chart]
    assert [plain(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", chart)][-3:] == names
    assert not re.search('#[0-9a-f]{6}[;"]', chart)
    assert (
        {f"var(--{color})" for color in COLORS}
        >= set(re.findall(r"var\([^)]*\)", chart))
        >= {f"var(--c{number})" for number in range(3)}
    )
