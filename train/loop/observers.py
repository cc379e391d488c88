"""What happens between steps. Each observer is called after every step on every rank; none of them waits for the
device except on the steps it acts on. Logging and checkpoints are in files of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from train.checkpointing.state import TrainState
from train.errors import NonFiniteError
from train.loop.metrics import Events
from train.loop.trainer import Trainer

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


class Evaluating:
    """Held-out scores before the first step, every `every_steps` steps, and after the last.

    Args:
        score: the held-out row of the model as it is; None where the corpus has no held-out windows.
    """

    def __init__(
        self, score: Callable[[], dict[str, Any]] | None, trainer: Trainer, events: Events, every_steps: int
    ) -> None:
        self.score, self.trainer, self.events, self.every_steps = score, trainer, events, every_steps
        self._newest: tuple[int, float | None] | None = None

    def loss_at(self, step: int) -> float | None:
        """Held-out MLM loss of that step, where it is the one evaluated last and the model predicts tokens."""
        return self._newest[1] if self._newest is not None and self._newest[0] == step else None

    def before_first_step(self, state: TrainState) -> None:
        """Score the untrained student, and its teacher once."""
        if state.step == 0:
            self._evaluate(state, with_teacher=True)

    def after_step(self, state: TrainState) -> None:
        """Score, if this is an evaluation step."""
        if state.step % self.every_steps == 0 or state.step == self.trainer.total_steps:
            self._evaluate(state, with_teacher=False)

    def _evaluate(self, state: TrainState, with_teacher: bool) -> None:
        if self.score is None:
            return
        with self.trainer.clock.host_section("evaluation"):
            row = self.score()
        loss = row.get("heldout_mlm_loss")
        self._newest = (state.step, loss)
        for name, value in {"heldout_mlm_loss": loss}.items() if loss is not None else row.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"{name} is {value} at step {state.step}. {NON_FINITE_REMEDY}")
        if not with_teacher:  # it does not change: its own scores stand in the first row alone
            row = {key: value for key, value in row.items() if "teacher" not in key}
        self.events.row(state.step, row)
