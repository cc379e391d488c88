"""The final figures of a run, from the rows of metrics.jsonl; from the last checkpoint, where the rows are gone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from train.checkpointing.state import TrainState

Rows = Sequence[Mapping[str, Any]]


def lacks_last_scores(rows: Rows, state: TrainState, total_steps: int) -> bool:
    """Whether a run has ended, and the held-out scores of its last step are gone: they are then measured again."""
    scored = any(row["step"] == state.step and _is_heldout(row) for row in rows)
    return state.step >= total_steps and not scored


def final_figures(rows: Rows, state: TrainState, tokens: int, log_every_steps: int) -> dict[str, Any]:
    """Figures for summary.json.

    Args:
        state: after the last step; its losses stand in where the last row is gone.
        tokens: seen by then.
    Returns:
        "tokens_per_s" and "loss" are None, and the held-out scores empty, where nothing holds them any more.
    """
    heldout = {row["step"]: row for row in rows if _is_heldout(row)}
    speeds = [row["tokens_per_s"] for row in rows if row.get("tokens_per_s") is not None]
    return {
        "steps": state.step,
        "tokens": tokens,
        "loss": _last_loss(rows, state, log_every_steps),
        "tokens_per_s": statistics.median_high(speeds) if speeds else None,
        "heldout_before": _without_step(heldout.get(0, {})),
        "heldout": _without_step(heldout.get(state.step, {})),
    }


def _is_heldout(row: Mapping[str, Any]) -> bool:
    return any(key.startswith("heldout_") and value is not None for key, value in row.items())


def lost_figures(figures: Mapping[str, Any]) -> str | None:
    """What cannot be rebuilt of a run whose rows are gone, for the user; None where nothing is missing."""
    lost = ["speed"] if figures["tokens_per_s"] is None and figures["steps"] else []
    if figures["heldout"] and not figures["heldout_before"]:
        lost.append("held-out scores before training")
    if not lost:
        return None
    return (
        "rows of metrics.jsonl are gone. Steps, tokens, loss and model come from the last checkpoint, held-out scores "
        f"are measured again; lost: curves, {', '.join(lost)}"
    )


def _last_loss(rows: Rows, state: TrainState, log_every_steps: int) -> float | None:
    """Mean since the row before the last, which is what the last row holds."""
    for row in rows:
        if row["step"] == state.step and "loss" in row:
            return row["loss"]
    window = state.loss_history[-((state.step - 1) % log_every_steps + 1) :]
    return statistics.fmean(window) if window else None


def _without_step(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "step"}
