"""The step loop. It is the recipe; everything else hangs on `Observer`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from train.checkpointing.state import TrainState
from train.data.loader import MicroBatch
from train.data.masking import MaskedBatch
from train.data.pipeline import RunData
from train.loop.loss_accumulator import LossSums
from train.loop.schedule import learning_rate
from train.loop.timing import Clock
from train.models.teacher import Teacher, TeacherOutput
from train.objective.distillation import DistillationLoss


class DistillationModule(nn.Module):
    """What the engine trains: the student, and the objective with its projection if it has one."""

    def __init__(self, student: PreTrainedModel, objective: DistillationLoss) -> None:
        super().__init__()
        self.student = student
        self.objective = objective

    def forward(
        self,
        masked: MaskedBatch,
        taught: TeacherOutput | None,
        num_masked_tokens: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The terms of one micro batch by their names in metrics.jsonl; "loss" has a gradient. See
        DistillationLoss.forward for `num_masked_tokens`.

        A dict, because the engine's backward pass prepares itself in hooks on the tensors of what forward returns: it
        looks into tuples, lists and dicts (DeepSpeed 0.19, runtime/engine.py and utils.py).
        """
        terms: dict[str, torch.Tensor] = self.objective(
            self.student, masked, taught, num_masked_tokens=num_masked_tokens
        )
        return terms


class Observer(Protocol):
    """Looks at the run after every step; may log, evaluate, save."""

    def after_step(self, state: TrainState) -> None: ...


class Trainer:
    """Holds what a step needs.

    Args:
        engine: DeepSpeed's engine around a DistillationModule.
        teacher: frozen, outside the engine; None where no term needs one.
        schedule: peak, warmup_steps, total_steps and decay_power of train/loop/schedule.py.
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
        self.total_steps: int = schedule["total_steps"]
        self.micro_batches_per_step: int = (
            engine.train_batch_size() // engine.train_micro_batch_size_per_gpu()
        )
        """Over all ranks."""
        self.losses = LossSums(self.micro_batches_per_step)
        self.done = 0
        """Steps done, of the whole run."""

    def train(self, state: TrainState, observers: Sequence[Observer]) -> TrainState:
        """From `state` to the last step; an observer ends the run early by raising.

        Returns:
            The state after the last step.
        """
        for step, micro_batches in self._steps(state.step):
            if step not in state.left_out:
                self._update(step, micro_batches)
            self.done = step + 1
            state = replace(state, step=self.done)
            for observer in observers:
                observer.after_step(state)
        return state

    def _update(self, step: int, micro_batches: Sequence[MicroBatch]) -> None:
        """One optimizer step."""
        engine, clock = self.engine, self.clock
        self._set_learning_rate(step)
        with clock.section("data"):
            batches, num_masked_tokens = self._mask(micro_batches)
        for micro_step, masked in enumerate(batches):
            self._seed_dropout(step, micro_step)
            with clock.section("teacher"):
                taught = self.teacher(masked.input_ids) if self.teacher else None
            with clock.section("student"):
                terms = engine(masked, taught, num_masked_tokens)
                engine.backward(terms["loss"])
            with clock.section("optimizer"):
                engine.step()
            self.losses.add(step, terms)

    def _set_learning_rate(self, step: int) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, **self.schedule)

    def _mask(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[MaskedBatch], torch.Tensor]:
        """A step's micro batches, masked on the device, and the mean number of masked tokens in one: over all ranks,
        so that every masked token of the global batch weighs the same. Nothing is waited for."""
        device = self.engine.device
        masked = [
            self.data.mask(
                batch.input_ids.to(device, non_blocking=True),
                batch.window_ids.to(device, non_blocking=True),
                batch.epoch,
            )
            for batch in micro_batches
        ]
        count = torch.stack([batch.valid.sum() for batch in masked]).sum()
        dist.all_reduce(count)
        return masked, count / (len(masked) * dist.get_world_size())

    def _seed_dropout(self, step: int, micro_step: int) -> None:
        """By the micro batch's place in the global batch."""
        place = self.rank * self.engine.gradient_accumulation_steps() + micro_step
        count = step * self.micro_batches_per_step + place
        # A CPU's generator takes the low 32 bits alone, so the seed is in them too, by a factor (2^32 / golden ratio)
        # that puts small seeds far apart.
        torch.manual_seed((self.dropout_seed * (2**40 + 0x9E3779B1) + count) % 2**63)

    def _steps(self, first: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        """(step, its micro batches) from step `first` on."""
        batches = self.data.batches(first, self.total_steps)
        waited = iter(self.clock.waiting_for("data", batches))
        accumulation = self.engine.gradient_accumulation_steps()
        for step in range(first, self.total_steps):
            yield step, [next(waited) for _ in range(accumulation)]
