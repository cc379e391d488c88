"""One call of transformers' Trainer, the same for every kind of task.

Trainer's checkpoints are made safe here: its own search takes the newest folder of the right name, be it whole or not.
Ours hold complete.json with the sizes of their files, written last; any other is removed.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from data_prep.shard_format.files import write_json
from data_prep.shard_format.terminal import progress_bar
from train.distributed.signals import StopRequest
from train.errors import NonFiniteError
from train.finetuning.batches import EpochBatches, Features
from train.finetuning.settings import Job
from train.models.cpu.attention import with_cpu_attention
from train.models.cpu.dropout import with_fast_dropout

COMPLETE = "complete.json"
SECONDS = "seconds.json"
"""In a checkpoint: what the seed has taken so far, over all its starts."""
EVAL_BATCH_SIZE = 64
WORTH_SAVING_S = 30.0
"""A seed that took less to train is not saved for the sake of its evaluation."""
Collate = Callable[[Sequence[Features]], dict[str, torch.Tensor]]
Loss = Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]
"""(model, batch) -> scalar; the batch is what `Collate` made, on the model's device."""


class Stopped(Exception):
    """A signal came, and what was done so far is saved."""


@dataclass(frozen=True)
class TrainingSet:
    """What a model is trained on."""

    examples: Sequence[Features]
    """What `collate` takes; the lengths of "input_ids" group the batches."""
    collate: Collate
    loss: Loss | None = None
    """None for the model's own."""


def fit(model: PreTrainedModel, data: TrainingSet, job: Job, seed: int, work: Path) -> tuple[float, float]:
    """Train `model` in place: AdamW, linear warm-up and decay, gradients clipped at norm 1.

    Goes on from the newest whole checkpoint in `work`, bit for bit on a CPU; leaves one every `job.checkpoint_seconds`.

    Returns:
        Seconds that the starts before this one took which it went on from; examples per second of this one.
    Raises:
        Stopped: `job.stop` asked for it; a checkpoint was left.
        NonFiniteError: the weights are no numbers any more.
    """
    settings = job.settings
    if not torch.cuda.is_available():
        with_fast_dropout(with_cpu_attention(model))
    num_examples = len(data.examples)
    lengths = np.array([len(example["input_ids"]) for example in data.examples])
    batches = EpochBatches(lengths, settings.batch_size, seed, settings.group_by_length)
    num_steps = math.ceil(settings.epochs * len(batches))
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(settings.warmup_ratio * num_steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,
        seed=seed,
        save_total_limit=2,
        **_quiet_arguments(job),
    )
    trainer = _FineTuner(model, arguments, data, batches)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_EpochOf(batches))
    checkpoint = newest_whole_checkpoint(work, job.say)
    started, seconds_before = time.monotonic(), _seconds_of(checkpoint)
    trainer.add_callback(_Checkpoints(job.checkpoint_seconds, job.stop, started - seconds_before))
    name = f"{job.task.name} seed {seed}"
    trainer.add_callback(_TrainingBar(name, num_examples, settings.batch_size))
    first_step = 0
    if checkpoint is not None:
        first_step = int(checkpoint.name.rpartition("-")[2])
        job.say(f"{name}: going on from step {first_step:,} of {num_steps:,}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    if state.global_step < state.max_steps:
        raise Stopped(f"{name}: stopped at step {state.global_step:,} of {state.max_steps:,}, saved")
    if not all(bool(torch.isfinite(weight).all()) for weight in model.parameters()):
        raise NonFiniteError(
            f"{name}: the weights are no numbers any more; give a lower --learning-rate than {settings.learning_rate:g}"
        )
    seconds = time.monotonic() - started
    return seconds_before, (state.global_step - first_step) * num_examples / len(batches) / seconds


def predict(
    model: PreTrainedModel, examples: Sequence[Features], collate: Collate, job: Job, name: str
) -> list[np.ndarray]:
    """The model's outputs (logits; start and end logits) for each example, in the order given.

    Longest first: least padding, and too little memory shows at once. Outputs as long as the input are padded by -100.

    Args:
        examples: without "labels".
        name: what the progress bar says.
    Returns:
        One fp32 array for each output of the model, (N, ...).
    """
    order = np.argsort([-len(example["input_ids"]) for example in examples], kind="stable")
    arguments = TrainingArguments(
        output_dir=str(job.folder), per_device_eval_batch_size=EVAL_BATCH_SIZE, **_quiet_arguments(job)
    )
    trainer = Trainer(model, arguments, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    bar = _PredictionBar(name, len(examples), job.stop)
    trainer.add_callback(bar)
    try:
        listed: Any = [examples[index] for index in order]
        found = trainer.predict(listed).predictions
    finally:
        bar.close()
    back = np.argsort(order)
    outputs = found if isinstance(found, tuple) else (found,)
    return [np.asarray(output, dtype=np.float32)[back] for output in outputs]


def newest_whole_checkpoint(work: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are all there in full; others are removed, aloud."""
    numbered = {int(path.name.rpartition("-")[2]): path for path in work.glob("checkpoint-*")}
    for _, path in sorted(numbered.items(), reverse=True):
        if _is_whole(path):
            return path
        say(f"{path} is not whole; the one before it is used, if there is one")
        shutil.rmtree(path)
    return None


def _seconds_of(checkpoint: Path | None) -> float:
    """0 without a checkpoint, or with one of before November 2026."""
    if checkpoint is None or not (checkpoint / SECONDS).exists():
        return 0.0
    return float(json.loads((checkpoint / SECONDS).read_text()))


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text())
    except (OSError, ValueError):
        return False
    return all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size
        for name, size in sizes.items()
    )


def _quiet_arguments(job: Job) -> dict[str, Any]:
    return {
        "bf16": bool(job.settings.bf16),
        "use_cpu": not torch.cuda.is_available(),  # else Trainer asks for a GPU where bf16 is on
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }


class _FineTuner(Trainer):
    """Trainer with our order of batches and, for soft labels, our loss."""

    def __init__(
        self, model: PreTrainedModel, arguments: TrainingArguments, data: TrainingSet, batches: EpochBatches
    ) -> None:
        examples: Any = data.examples
        super().__init__(model, arguments, data_collator=data.collate, train_dataset=examples)
        self._batches, self._own_loss = batches, data.loss

    def get_train_dataloader(self) -> DataLoader:
        examples: Any = self.train_dataset
        return DataLoader(examples, batch_sampler=self._batches, collate_fn=self.data_collator)

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        if self._own_loss is None:
            return super().compute_loss(model, inputs, *arguments, **named)
        return self._own_loss(model, inputs)

    def floating_point_ops(self, inputs: Any) -> int:
        """Nobody asks; counting the parameters at every step costs a small model a tenth of its time."""
        return 0


class _EpochOf(TrainerCallback):
    def __init__(self, batches: EpochBatches) -> None:
        self._batches = batches

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._batches.epoch = state.global_step // len(self._batches)


class _Checkpoints(TrainerCallback):
    """Asks Trainer for a checkpoint when it is time, or when a signal came, and then also for the end."""

    def __init__(self, every_s: float, stop: StopRequest | None, started: float) -> None:
        self._every_s, self._stop, self._started = every_s, stop, started
        self._last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        since = time.monotonic() - self._last
        if state.global_step >= state.max_steps:
            # What follows, the evaluation, may be stopped too.
            control.should_save = since >= min(self._every_s, WORTH_SAVING_S)
            return
        stop = self._stop is not None and self._stop.requested
        if stop or since >= self._every_s:
            control.should_save = True
            control.should_training_stop = stop

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        write_json(checkpoint / SECONDS, time.monotonic() - self._started)
        files = [path for path in checkpoint.rglob("*") if path.is_file()]
        sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
        write_json(checkpoint / COMPLETE, sizes)
        self._last = time.monotonic()


def _bar(name: str, total: int, initial: int = 0) -> Any:
    return progress_bar(
        total=total, initial=initial, desc=name, unit=" examples", unit_scale=True, leave=False
    )


class _TrainingBar(TrainerCallback):
    def __init__(self, name: str, num_examples: int, batch_size: int) -> None:
        self._name, self._num_examples, self._batch_size = name, num_examples, batch_size

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._total = round(args.num_train_epochs * self._num_examples)
        done = min(self._total, state.global_step * self._batch_size)
        self._bar = _bar(self._name, self._total, done)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._bar.update(min(self._batch_size, self._total - self._bar.n))

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._bar.close()


class _PredictionBar(TrainerCallback):
    def __init__(self, name: str, total: int, stop: StopRequest | None) -> None:
        self._name, self._total, self._stop = name, total, stop
        self._bar = _bar(name, total)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._bar.update(min(args.eval_batch_size, self._total - self._bar.n))
        if self._stop is not None and self._stop.requested:
            raise Stopped(f"{self._name}: stopped")

    def close(self) -> None:
        self._bar.close()
