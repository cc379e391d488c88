"""The rows of metrics.jsonl: loss, speed and optimizer figures every few steps, and loss spikes."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from train.checkpointing.state import TrainState
from train.config import Config
from train.errors import NonFiniteError
from train.lamb import Lamb
from train.loop.metrics import Events
from train.loop.observers.loss_spikes import Spike, SpikeDetector
from train.loop.observers.overflows import NON_FINITE_REMEDY
from train.loop.trainer import Trainer

# Sections of the clock that are left out of a step's throughput.
BESIDE_TRAINING = ("evaluation", "checkpoint")


@dataclass(frozen=True)
class ComputeCost:
    """For the utilisation (mfu) of a row."""

    flops_per_token: Mapping[int, float]
    """Model FLOPs of teacher and student, by sequence length (train/models/flops.py)."""
    matrix_rate: float
    """FLOP/s that one rank has reached in a matrix product at the start."""


class Logging:
    """Logs every config.run.log_every_steps steps and after the last; judges the loss of every step.

    Args:
        state: that training starts from.
    """

    def __init__(
        self, trainer: Trainer, events: Events, config: Config, cost: ComputeCost, state: TrainState
    ) -> None:
        self.trainer, self.events, self.cost = trainer, events, cost
        self._peak_rate = cost.matrix_rate
        self.every_steps = config.run.log_every_steps
        self.term_weights = config.objective.term_weights()
        self.spikes = SpikeDetector(config.run.spike_deviations, state.loss_history)
        trainer.clock.read()  # drops what a start that diverged has spent
        self._since_step, self._since_s = state.step, time.perf_counter()

    def after_step(self, state: TrainState) -> None:
        """Log, if this is a logging step."""
        if state.step % self.every_steps and state.step != self.trainer.total_steps:
            return
        if self.trainer.losses.is_empty:  # every step since the last row was left out
            return
        ratios = self._trust_ratios()
        figures = {**self._optimizer(), **_spread(ratios)}
        row = {**self._progress(state), **self._losses(), **figures, **self._speed(state)}
        self.events.row(state.step, row, {} if ratios is None else {"trust_ratios": ratios})
        if not math.isfinite(row["loss"]) and not self.trainer.engine.fp16_enabled():
            raise NonFiniteError(
                f"the loss is {row['loss']} at step {state.step} or shortly before. {NON_FINITE_REMEDY}"
            )

    def _progress(self, state: TrainState) -> dict[str, float]:
        data = self.trainer.data
        return {
            "epoch": round(data.epochs_before(state.step), 6),
            "tokens": data.tokens_before(state.step, state.left_out),
        }

    def _losses(self) -> dict[str, float]:
        """Mean terms since the last row, and how much of the loss each weighted term makes up."""
        terms, steps, means = self.trainer.losses.take()
        dist.all_reduce(means)
        values = (means / dist.get_world_size()).tolist()
        losses = dict(zip(terms, values, strict=False))
        for step, loss in zip(steps, values[len(terms) :], strict=True):
            if (spike := self.spikes.look(step, loss)) is not None:
                self._record(spike)
        shares = {
            name.replace("loss", "share"): weight * losses[name] / losses["loss"]
            for name, weight in self.term_weights.items()
            if name in losses and losses["loss"]
        }
        return {**losses, **shares}

    def _record(self, spike: Spike) -> None:
        """Leave a spike with its sequences in spikes.jsonl, and say where it is."""
        figures = spike._asdict()
        step = figures.pop("step")
        window_ids = self.trainer.data.window_ids(step).tolist()
        self.events.record("spikes", step + 1, {"batch_of_step": step, **figures, "window_ids": window_ids})
        self.events.say(
            f"loss spike: {spike.loss:.4g} in step {step + 1}, {spike.median:.4g} before; its sequences stand in "
            f"spikes.jsonl, see them with launch/inspect_batch.py --config RUN/config.yaml --step {step}"
        )

    def _optimizer(self) -> dict[str, float]:
        engine = self.trainer.engine
        norm = engine.get_global_grad_norm()
        return {
            "lr": engine.optimizer.param_groups[0]["lr"],
            "grad_norm": float("nan") if norm is None else float(norm),
            "loss_scale": float(getattr(engine.optimizer, "loss_scale", 1.0)),
            "skipped_steps": engine.skipped_steps,
        }

    def _trust_ratios(self) -> torch.Tensor | None:
        """LAMB's, of the tensors that are adapted; None for another optimizer."""
        optimizer = self.trainer.engine.optimizer.optimizer
        return optimizer.trust_ratios[optimizer.adapted].float() if isinstance(optimizer, Lamb) else None

    def _speed(self, state: TrainState) -> dict[str, float]:
        """Per step and per second since the last row, or since the start."""
        now, steps = time.perf_counter(), state.step - self._since_step
        spent = self.trainer.clock.read()
        beside_training = sum(spent.pop(name, 0.0) for name in BESIDE_TRAINING)
        data = self.trainer.data
        before = data.tokens_before(self._since_step, state.left_out)
        tokens = data.tokens_before(state.step, state.left_out) - before
        tokens_per_s = tokens / (now - self._since_s - beside_training)
        flops_per_token = self.cost.flops_per_token[data.phase_of(state.step - 1).sequence_length]
        self._since_step, self._since_s = state.step, now
        rate = tokens_per_s * flops_per_token / dist.get_world_size()
        # Training faster than the measured peak: other work disturbed that measurement, and this rate is the new peak.
        self._peak_rate = max(self._peak_rate, rate)
        return {
            "tokens_per_s": tokens_per_s,
            "mfu": rate / self._peak_rate,
            **{f"time_{name}": seconds / steps for name, seconds in spent.items()},
            "memory_gib": _memory_gib(self.trainer.engine.device),
        }


def _spread(trust_ratios: torch.Tensor | None) -> dict[str, float]:
    if trust_ratios is None:
        return {}
    low, middle, high = torch.stack([trust_ratios.min(), trust_ratios.median(), trust_ratios.max()]).tolist()
    return {"trust_ratio_min": low, "trust_ratio_median": middle, "trust_ratio_max": high}


def _memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: allocated on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
