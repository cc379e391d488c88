"""What ends a run whose gradients are no numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from train.checkpointing.state import TrainState
from train.errors import NonFiniteError
from train.loop.observers import Overflows


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
