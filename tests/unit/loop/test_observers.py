"""What ends a run whose gradients are no numbers."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from train.checkpointing.state import TrainState
from train.errors import NonFiniteError
from train.loop.observers.evaluation import Evaluating
from train.loop.observers.overflows import Overflows


@pytest.mark.parametrize(
    ("fp16", "remedy"), [(True, "or use ds_configs/bf16.json"), (False, "lengthen schedule.warmup_steps")]
)
def test_skipped_steps_in_a_row_end_the_run(fp16: bool, remedy: str) -> None:
    """DeepSpeed skips the steps of infinite or NaN gradients in every format; one that it takes breaks the row."""
    engine = SimpleNamespace(skipped_steps=4, fp16_enabled=lambda: fp16)
    overflows = Overflows(engine, limit=3)
    for step, skipped in enumerate([5, 6, 6, 7, 8]):
        engine.skipped_steps = skipped
        overflows.after_step(TrainState(step=step))
    engine.skipped_steps = 9
    with pytest.raises(NonFiniteError, match=f"infinite or NaN in 3 steps in a row up to step 5.*{remedy}"):
        overflows.after_step(TrainState(step=5))


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"heldout_mlm_loss": 2.0, "heldout_kl": float("inf"), "heldout_masking": "15 %"}, None),
        ({"heldout_mlm_loss": float("nan")}, "heldout_mlm_loss is nan at step 4"),
        ({"heldout_relation": 1.0, "heldout_cos": float("inf")}, "heldout_cos is inf at step 4"),
    ],
)
def test_a_held_out_loss_that_is_no_number_ends_the_run(row: dict[str, Any], named: str | None) -> None:
    """The model's own; a teacher in half precision may have an infinity of its own."""
    rows: list[dict[str, Any]] = []
    trainer: Any = SimpleNamespace(
        total_steps=8, clock=SimpleNamespace(host_section=lambda name: contextlib.nullcontext())
    )
    events: Any = SimpleNamespace(row=lambda step, values: rows.append(values))
    evaluating = Evaluating(lambda: row, trainer, events, 4)
    with contextlib.nullcontext() if named is None else pytest.raises(NonFiniteError, match=named):
        evaluating.after_step(TrainState(step=4))
    assert rows == ([row] if named is None else [])
