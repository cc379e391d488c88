"""The step loop. It is the recipe; everything else hangs on `Observer`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from train.checkpoint import TrainState
from train.clock import Clock
from train.loader import MicroBatch
from train.loss_sums import LossSums
from train.masking import MaskedBatch
from train.objective import DistillationLoss, LossTerms
from train.run_data import RunData
from train.schedule import learning_rate
from train.teacher import Teacher, TeacherOutput


class DistillationModule(nn.Module):
    """What the engine trains: the student, and the objective with its projection if it has one."""

    def __init__(self, student: PreTrainedModel, objective: DistillationLoss) -> None:
        super().__init__()
        self.student = student
        self.objective = objective

    def forward(self, masked: MaskedBatch, taught: TeacherOutput | None) -> LossTerms:
        """The loss terms of one micro batch."""
        terms: LossTerms = self.objective(self.student, masked, taught)
        return terms


class Observer(Protocol):
    """Looks at the run after every step; may log, evaluate, save."""

    def after_step(self, state: TrainState) -> None: ...


class Trainer:
    """Holds what a step needs.

    Args:
        engine: DeepSpeed's engine around a DistillationModule.
        teacher: frozen, outside the engine; None where no term needs one.
        schedule: peak, warmup_steps, total_steps and decay_power of train/schedule.py.
        dropout_seed: dropout is a function of it, the step and the micro batch's place in the global batch:
            a checkpoint needs no random state, and the number of ranks changes nothing.
        rank: of this process.
    """

    def __init__(
        self,
        engine: Any,
        teacher: Teacher | None,
        data: RunData,
        schedule: dict[str, Any],
        dropout_seed: int,
        rank: int,
        clock: Clock,
    ) -> None:
        self.engine, self.teacher, self.data = engine, teacher, data
        self.schedule, self.dropout_seed, self.rank, self.clock = schedule, dropout_seed, rank, clock
        self.losses = LossSums()

    def train(self, state: TrainState, observers: Sequence[Observer]) -> TrainState:
        """From `state` to the last step; an observer ends the run early by raising.

        Returns:
            The state after the last step.
        """
        engine, clock = self.engine, self.clock
        for step, micro_batches in self._steps(state.step):
            self._begin_step(step)
            for micro_batch in micro_batches:
                with clock.section("data"):
                    masked = self._begin_micro_step(micro_batch)
                with clock.section("teacher"):
                    taught = self.teacher(masked.input_ids) if self.teacher else None
                with clock.section("student"):
                    terms = engine(masked, taught)
                    engine.backward(terms.loss)
                with clock.section("optimizer"):
                    engine.step()
                self.losses.add(step, terms)
            state = replace(state, step=step + 1)
            for observer in observers:
                observer.after_step(state)
        return state

    def _begin_step(self, step: int) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, **self.schedule)

    def _begin_micro_step(self, batch: MicroBatch) -> MaskedBatch:
        """Seed dropout; copy the micro batch to the device and mask it there."""
        accumulation = self.engine.gradient_accumulation_steps()
        micro_batches = self.engine.train_batch_size() // self.engine.train_micro_batch_size_per_gpu()
        place = self.rank * accumulation + batch.micro_step
        torch.manual_seed(((self.dropout_seed << 40) + batch.step * micro_batches + place) % 2**63)
        device = self.engine.device
        input_ids = batch.input_ids.to(device, non_blocking=True)
        return self.data.mask(input_ids, batch.window_ids.to(device, non_blocking=True), batch.epoch)

    def _steps(self, first: int) -> Iterator[tuple[int, Iterable[MicroBatch]]]:
        """(step, its micro batches) from step `first` on."""
        batches = self.data.batches(first, self.schedule["total_steps"])
        waited = iter(self.clock.waiting_for("data", batches))
        accumulation = self.engine.gradient_accumulation_steps()
        for step in range(first, self.schedule["total_steps"]):
            yield step, (next(waited) for _ in range(accumulation))
