"""A run whose gradients are infinite or NaN in too many steps in a row ends, with what helps."""

from __future__ import annotations

from typing import Any

from train.checkpointing.state import TrainState
from train.errors import NonFiniteError

ROLLBACK = "--run.rollback_on_divergence=2 goes on from the last checkpoint without the bad batches"
NON_FINITE_REMEDY = (
    "Lower optimizer.lr or lengthen schedule.warmup_steps, then start again (a changed rate needs "
    f"--checkpoint.allow_changed_config=true, or another run.dir); {ROLLBACK}"
)
FP16_REMEDY = f"Lower optimizer.lr, or use ds_configs/bf16.json where the GPU has bf16; {ROLLBACK}"


class Overflows:
    """Stops the run after too many skipped steps in a row: DeepSpeed skips those of infinite or NaN gradients."""

    def __init__(self, engine: Any, limit: int) -> None:
        self.engine, self.limit = engine, limit
        self._skipped, self._in_a_row = int(engine.skipped_steps), 0
        self.steps: list[int] = []
        """Skipped ones, counted from 0."""

    def after_step(self, state: TrainState) -> None:
        """Count; no device is waited for: the engine knows on the host what it skipped."""
        if state.step - 1 in state.left_out:
            return
        skipped = int(self.engine.skipped_steps)
        self.steps += [state.step - 1] * (skipped > self._skipped)
        self._in_a_row = self._in_a_row + 1 if skipped > self._skipped else 0
        self._skipped = skipped
        if self._in_a_row >= self.limit:
            raise NonFiniteError(
                f"gradients were infinite or NaN in {self._in_a_row} steps in a row up to step {state.step}. "
                + (FP16_REMEDY if self.engine.fp16_enabled() else NON_FINITE_REMEDY)
            )
