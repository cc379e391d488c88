"""When a checkpoint is due, and what happens where it cannot be written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from train.checkpointing.checkpoint import Checkpointer
from train.checkpointing.state import TrainState
from train.config_sections.running import CheckpointConfig
from train.distributed.signals import StopRequest
from train.errors import CheckpointNotWrittenError, NonFiniteError
from train.loop.divergence import weights_are_finite
from train.loop.metrics import Events
from train.loop.observers.loss_spikes import SpikeDetector
from train.loop.observers.overflows import NON_FINITE_REMEDY
from train.loop.trainer import Trainer


class StoppedAfterSavingError(Exception):
    """A signal asked for a stop; everything up to the last step is saved."""


class Checkpointing:
    """Saves every checkpoint.every_steps steps, after the last step, and when a signal asks for a stop.

    Args:
        spikes: its loss history is part of a checkpoint.
        heldout_loss: held-out loss of a step, where it was evaluated.
        first_step: of this start.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        trainer: Trainer,
        config: CheckpointConfig,
        *,
        events: Events,
        stop: StopRequest,
        spikes: SpikeDetector,
        heldout_loss: Callable[[int], float | None],
        first_step: int,
    ) -> None:
        self.checkpointer, self.trainer, self.config, self.events = checkpointer, trainer, config, events
        self.stop, self.spikes, self.heldout_loss, self._failures = stop, spikes, heldout_loss, 0
        self.newest_step = first_step
        """That a start would go on with."""
        # A flag goes round through gloo, on the host: with NCCL every step would wait for the device.
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    def before_first_step(self, state: TrainState) -> None:
        """Save what a divergence before the first checkpoint goes back to, or a run of no steps leaves."""
        if state.step == 0:
            self._save(state, must_succeed=True)

    def after_step(self, state: TrainState) -> None:
        """Save if it is time or a stop was asked for on any rank.

        Raises:
            StoppedAfterSavingError: a stop was asked for; the state is saved.
        """
        stop = self._on_any_rank(self.stop.requested)
        last = state.step == self.trainer.total_steps
        if stop or last or state.step % self.config.every_steps == 0:
            self._save(state, must_succeed=stop or last)
        if stop and not last:
            raise StoppedAfterSavingError(
                f"stopped after step {state.step}, which is saved; run again to continue"
            )

    def _save(self, state: TrainState, must_succeed: bool) -> None:
        self._refuse_non_finite_weights(state)
        try:
            with self.trainer.clock.host_section("checkpoint"):
                whole = replace(state, losses=self.trainer.losses.window(), loss_history=self.spikes.history)
                written = self.checkpointer.save(whole, self.heldout_loss(state.step))
        except CheckpointNotWrittenError as error:
            self._failures += 1
            if must_succeed or self._failures >= self.config.stop_after_failures:
                raise
            again = f"the next attempt is {self.config.every_steps} steps away"
            self.events.say(f"{error}; training goes on, {again}")
            return
        self._failures, self.newest_step = 0, state.step
        self.events.row(
            state.step, {"time_checkpoint": written.seconds, "checkpoint_gib": written.bytes / 2**30}
        )

    def _refuse_non_finite_weights(self, state: TrainState) -> None:
        """A checkpoint of a diverged model would push out the good ones. In fp16 an infinite loss is an overflow
        whose step was skipped, and says nothing of the weights."""
        engine = self.trainer.engine
        losses_finite = self.trainer.losses.were_finite() or engine.fp16_enabled()
        if self._on_any_rank(not (losses_finite and weights_are_finite(engine))):
            raise NonFiniteError(
                f"losses or weights have become infinite or NaN by step {state.step}; nothing is saved over the "
                f"checkpoints before. {NON_FINITE_REMEDY}"
            )

    def _on_any_rank(self, here: bool) -> bool:
        """One number over gloo, no device is waited for."""
        if self._group is None:
            return here
        flag = torch.tensor([int(here)], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())
