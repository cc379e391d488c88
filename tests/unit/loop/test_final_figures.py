"""The figures that a run ends with, also where only its checkpoints are left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train.checkpointing.state import TrainState
from train.loop.closing_summary import closing_lines
from train.loop.final_figures import final_figures, lacks_last_scores, lost_figures

STATE = TrainState(10, loss_history=(9.0, 8.0, 7.0, 6.0, 5.0, 4.0))
BEFORE = {"heldout_mlm_loss": 9.5, "teacher_heldout_mlm_loss": 2.0}
LAST = {"heldout_mlm_loss": 4.5}
ROWS: list[dict[str, Any]] = [
    {"step": 0, **BEFORE},
    {"step": 4, "loss": 8.0, "tokens": 40, "tokens_per_s": 5.0},
    {"step": 8, "loss": None, "tokens": 80, "tokens_per_s": None},
    {"step": 8, "heldout_mlm_loss": 5.5},
    {"step": 10, "loss": 4.4, "tokens": 100, "tokens_per_s": 7.0},
    {"step": 10, **LAST},
]


def test_figures_of_all_rows() -> None:
    assert not lacks_last_scores(ROWS, STATE, 10)
    figures = final_figures(ROWS, STATE, 100, 4)
    assert figures == {
        "steps": 10,
        "tokens": 100,
        "loss": 4.4,
        "tokens_per_s": 7.0,
        "heldout_before": BEFORE,
        "heldout": LAST,
    }
    assert lost_figures(figures) is None


def test_figures_where_the_rows_are_gone() -> None:
    """The loss is that of the steps after the last full row, as the last row's was; what is lost is said."""
    assert lacks_last_scores([], STATE, 10)
    assert not lacks_last_scores([], STATE, 11)  # it goes on, and is scored at its end
    measured_again = [{"step": 10, **LAST}]
    figures = final_figures(measured_again, STATE, 100, 4)
    assert (figures["steps"], figures["tokens"], figures["loss"]) == (10, 100, 4.5)
    assert (figures["tokens_per_s"], figures["heldout_before"], figures["heldout"]) == (None, {}, LAST)
    assert (lost_figures(figures) or "").endswith("lost: curves, speed, held-out scores before training")
    lines = closing_lines(Path("run"), Path("run/model"), {**figures, "teacher": "t"})
    assert lines[1] == "held-out loss  4.5000 nats a masked token"
    assert lines[3] == "speed          not known"


def test_a_loss_that_is_known_nowhere_is_none() -> None:
    assert final_figures([], TrainState(10), 100, 4)["loss"] is None
    overflowed = final_figures([{**ROWS[4], "loss": None}], STATE, 100, 4)
    assert overflowed["loss"] is None
    assert lost_figures(overflowed) is None  # nothing is gone: in fp16 the last step may overflow
