"""Held-out scores between steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from train.checkpointing.state import TrainState
from train.errors import NonFiniteError
from train.loop.metrics import Events
from train.loop.observers.overflows import NON_FINITE_REMEDY
from train.loop.trainer import Trainer


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
