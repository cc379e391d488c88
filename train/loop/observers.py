"""What happens between steps: logging, evaluation, checkpoints, stopping. Each is one class, called after
every step on every rank; none of them waits for the device except on the steps it acts on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train.checkpointing.checkpoint import Retention, TrainState, save_checkpoint
from train.distributed.signals import StopRequest
from train.distributed.world import World, agree_to_stop
from train.errors import CheckpointNotWrittenError, NonFiniteError
from train.loop.loss_accumulator import LossSums
from train.loop.loss_spikes import Spike, SpikeDetector
from train.loop.metrics import Events
from train.loop.timing import Clock
from train.loop.trainer import Trainer

NON_FINITE_REMEDY = (
    "Lower optimizer.lr or lengthen schedule.warmup_steps, then start again (a changed rate needs "
    "--checkpoint.allow_changed_config=true, or another run.dir)"
)

FP16_REMEDY = "Lower optimizer.lr, or use ds_configs/bf16.json where the GPU has bf16"

# Sections of the clock that are left out of a step's throughput.
BESIDE_TRAINING = ("evaluation", "checkpoint")


class StoppedAfterSavingError(Exception):
    """A signal asked for a stop; everything up to the last step is saved."""


class Logging:
    """A row of loss, speed and optimizer figures every `every_steps` steps.

    Args:
        flops_per_token: model FLOPs of teacher and student, by sequence length (train/models/flops.py).
        matrix_rate: FLOP/s that one rank reaches in a matrix product, for the utilisation (mfu).
        term_weights: of the objective, by the term's name in metrics.jsonl.
        spikes: judges the loss of every step.
        first_step: steps done before this start.
    """

    def __init__(
        self,
        trainer: Trainer,
        events: Events,
        world: World,
        *,
        every_steps: int,
        flops_per_token: Mapping[int, float],
        matrix_rate: float,
        term_weights: Mapping[str, float],
        spikes: SpikeDetector,
        first_step: int,
    ) -> None:
        self.trainer, self.events, self.world = trainer, events, world
        self.every_steps = every_steps
        self.flops_per_token, self.matrix_rate = flops_per_token, matrix_rate
        self.term_weights, self.spikes = term_weights, spikes
        self._since_step, self._since_s = first_step, time.perf_counter()

    def after_step(self, state: TrainState) -> None:
        """Log, if this is a logging step."""
        total_steps = self.trainer.schedule["total_steps"]
        if state.step % self.every_steps and state.step != total_steps:
            return
        row = self._losses(state)
        row.update(self._optimizer())
        row.update(self._speed(state))
        lamb = self.trainer.engine.optimizer.optimizer
        self.events.row(state.step, row, {"trust_ratios": lamb.trust_ratios[lamb.adapted]})
        self._check_finite(state, row["loss"])

    def _losses(self, state: TrainState) -> dict[str, float]:
        terms, steps, means = self.trainer.losses.take()
        dist.all_reduce(means)
        values = (means / self.world.world_size).tolist()
        losses = dict(zip(terms, values, strict=False))
        for step, loss in zip(steps, values[len(terms) :], strict=True):
            if (spike := self.spikes.look(step, loss)) is not None:
                self._tell(spike)
        data = self.trainer.data
        progress = {
            "epoch": round(data.epochs_before(state.step), 6),
            "tokens": data.tokens_before(state.step),
        }
        return {**progress, **losses, **self._shares(losses)}

    def _shares(self, losses: Mapping[str, float]) -> dict[str, float]:
        """How much of the loss each weighted term makes up."""
        return {
            name.replace("loss", "share"): weight * losses[name] / losses["loss"]
            for name, weight in self.term_weights.items()
            if name in losses and losses["loss"]
        }

    def _tell(self, spike: Spike) -> None:
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
        lamb = engine.optimizer.optimizer
        ratios = lamb.trust_ratios[lamb.adapted].float()
        low, middle, high = torch.stack([ratios.min(), ratios.median(), ratios.max()]).tolist()
        norm = engine.get_global_grad_norm()
        return {
            "lr": lamb.param_groups[0]["lr"],
            "grad_norm": float("nan") if norm is None else float(norm),
            "loss_scale": float(getattr(engine.optimizer, "loss_scale", 1.0)),
            "skipped_steps": engine.skipped_steps,
            "trust_ratio_min": low,
            "trust_ratio_median": middle,
            "trust_ratio_max": high,
        }

    def _speed(self, state: TrainState) -> dict[str, float]:
        now, steps = time.perf_counter(), state.step - self._since_step
        spent = self.trainer.clock.read()
        beside_training = sum(spent.pop(name, 0.0) for name in BESIDE_TRAINING)
        data = self.trainer.data
        tokens = data.tokens_before(state.step) - data.tokens_before(self._since_step)
        tokens_per_s = tokens / (now - self._since_s - beside_training)
        flops_per_token = self.flops_per_token[data.phase_of(state.step - 1).sequence_length]
        self._since_step, self._since_s = state.step, now
        times = {f"time_{name}": seconds / steps for name, seconds in spent.items()}
        peak = self.matrix_rate * self.world.world_size
        return {
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * flops_per_token / peak,
            **times,
            "memory_gib": _memory_gib(self.world.device),
        }

    def _check_finite(self, state: TrainState, loss: float) -> None:
        if not math.isfinite(loss) and not self.trainer.engine.fp16_enabled():
            raise NonFiniteError(
                f"the loss is {loss} at step {state.step} or shortly before. {NON_FINITE_REMEDY}"
            )


class Overflows:
    """Stops the run after too many skipped steps in a row: DeepSpeed skips those of infinite or NaN gradients."""

    def __init__(self, engine: Any, limit: int) -> None:
        self.engine, self.limit = engine, limit
        self._skipped, self._in_a_row = int(engine.skipped_steps), 0

    def after_step(self, state: TrainState) -> None:
        """Count; no device is waited for: the engine knows on the host what it skipped."""
        skipped = int(self.engine.skipped_steps)
        self._in_a_row = self._in_a_row + 1 if skipped > self._skipped else 0
        self._skipped = skipped
        if self._in_a_row >= self.limit:
            raise NonFiniteError(
                f"gradients were infinite or NaN in {self._in_a_row} steps in a row up to step {state.step}. "
                + (FP16_REMEDY if self.engine.fp16_enabled() else NON_FINITE_REMEDY)
            )


class Evaluating:
    """Held-out scores before the first step, every `every_steps` steps, and after the last."""

    def __init__(
        self,
        score: Callable[[], dict[str, float]],
        events: Events,
        clock: Clock,
        *,
        every_steps: int,
        total_steps: int,
    ) -> None:
        self.score, self.events, self.clock = score, events, clock
        self.every_steps, self.total_steps = every_steps, total_steps
        self._newest: tuple[int, float] | None = None

    def loss_at(self, step: int) -> float | None:
        """Held-out MLM loss of that step, where it is the one evaluated last."""
        return self._newest[1] if self._newest is not None and self._newest[0] == step else None

    def before_first_step(self, state: TrainState) -> None:
        """Score the untrained student, and its teacher once."""
        if state.step == 0:
            self._score(state, first=True)

    def after_step(self, state: TrainState) -> None:
        """Score, if this is an evaluation step."""
        if state.step % self.every_steps == 0 or state.step == self.total_steps:
            self._score(state, first=False)

    def _score(self, state: TrainState, first: bool) -> None:
        with self.clock.host_section("evaluation"):
            row = self.score()
        self._newest = (state.step, row["heldout_mlm_loss"])
        if not math.isfinite(row["heldout_mlm_loss"]):
            raise NonFiniteError(
                f"the held-out loss is {row['heldout_mlm_loss']} at step {state.step}. {NON_FINITE_REMEDY}"
            )
        # The teacher does not change: its own scores stand in the first row alone.
        self.events.row(state.step, row if first else {k: v for k, v in row.items() if "teacher" not in k})


class Checkpointing:
    """Saves every `every_steps` steps, after the last step, and when a signal asks for a stop."""

    def __init__(
        self,
        engine: Any,
        folder: Path,
        events: Events,
        clock: Clock,
        world: World,
        stop: StopRequest,
        *,
        every_steps: int,
        retention: Retention,
        stop_after_failures: int,
        total_steps: int,
        heldout: Callable[[int], float | None],
        description: Path,
        losses: LossSums,
        spikes: SpikeDetector,
    ) -> None:
        self.engine, self.folder, self.events, self.clock = engine, folder, events, clock
        self.world, self.stop = world, stop
        self.every_steps, self.retention, self.total_steps = every_steps, retention, total_steps
        self.stop_after_failures, self.heldout, self.description = stop_after_failures, heldout, description
        self.losses, self.spikes, self._failures = losses, spikes, 0
        # Ranks agree through gloo, on the host: with NCCL every step would wait for the device.
        self._group = dist.new_group(backend="gloo") if world.world_size > 1 else None

    def after_step(self, state: TrainState) -> None:
        """Save if it is time or a stop was asked for on any rank.

        Raises:
            StoppedAfterSavingError: a stop was asked for; the state is saved.
        """
        stop = self.stop.requested
        if self._group is not None:
            stop = agree_to_stop(stop, self._group)
        due = state.step % self.every_steps == 0
        last = state.step == self.total_steps
        if due or stop or last:
            self._save(state, must_succeed=stop or last)
        if stop and state.step < self.total_steps:
            raise StoppedAfterSavingError(
                f"stopped after step {state.step}, which is saved; run again to continue"
            )

    def _save(self, state: TrainState, must_succeed: bool) -> None:
        heldout = self.heldout(state.step)
        self._refuse_non_finite_weights(state)
        try:
            with self.clock.host_section("checkpoint"):
                written = save_checkpoint(
                    self.engine,
                    self.folder,
                    replace(state, losses=self.losses.window(), loss_history=self.spikes.history),
                    self.world.world_size,
                    self.retention,
                    heldout,
                    self.description,
                )
        except CheckpointNotWrittenError as error:
            self._failures += 1
            if must_succeed or self._failures >= self.stop_after_failures:
                raise
            self.events.say(f"{error}; training goes on, the next attempt is {self.every_steps} steps away")
            return
        self._failures = 0
        self.events.row(
            state.step, {"time_checkpoint": written.seconds, "checkpoint_gib": written.bytes / 2**30}
        )

    def _refuse_non_finite_weights(self, state: TrainState) -> None:
        """A checkpoint of a diverged model would push out the good ones. In fp16 an infinite loss is an overflow
        whose step was skipped, and says nothing of the weights."""
        losses_finite = self.losses.were_finite() or self.engine.fp16_enabled()
        sums = [parameter.detach().double().sum() for parameter in self.engine.module.parameters()]
        fine = torch.isfinite(torch.stack(sums)).all() & losses_finite
        if self._group is not None:
            fine = ~torch.tensor(agree_to_stop(not bool(fine), self._group))
        if not bool(fine):
            raise NonFiniteError(
                f"losses or weights have become infinite or NaN by step {state.step}; nothing is saved over the "
                f"checkpoints before. {NON_FINITE_REMEDY}"
            )


def _memory_gib(device: str) -> float:
    """Peak memory of this rank: allocated on its GPU, or resident on the host."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
