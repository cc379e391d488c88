"""A run's batches from its first step to its last: one sequence length, or a short one first.

With `schedule.short_sequence_length` the run has two phases, as BERT's pretraining had (Devlin et al. 2019,
appendix A.2: 128 tokens for 90 % of the steps, then 512 for the rest). Each phase has a data order of its own,
which begins at its first step: a step's batch stays a pure function of the recipe and the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from data_prep.shard_format.manifest import Manifest
from train.config import Config
from train.config_sections.training import DEFAULT_MICRO_BATCH_SIZE, MAX_STEPS
from train.data.loader import BatchLoader, MicroBatch
from train.data.masking import MaskedBatch, Masker, NoMasking, continuation_table
from train.data.order import largest_micro_batch
from train.data.shards import read_histogram
from train.errors import UserError
from train.models.build import tokenizer_source
from train.models.encoder_config import read_tokenizer

# Sanh et al. 2019; where the recipe gives neither training.epochs nor training.max_steps.
PUBLISHED_EPOCHS = 3.0


@dataclass(frozen=True)
class Phase:
    """Consecutive steps of one sequence length."""

    first_step: int
    stop_step: int
    """One past the last."""
    sequence_length: int
    loader: BatchLoader
    masker: Masker | NoMasking


class RunData:
    """The micro batches of one rank, their masks, and how far a step has come.

    Args:
        phases: in order, without gaps from step 0; the last one goes on for steps past the run's end.
    """

    def __init__(self, phases: list[Phase]) -> None:
        self.phases = phases
        self.total_steps = phases[-1].stop_step
        self._maskers = {phase.sequence_length: phase.masker for phase in phases}

    def phase_of(self, step: int) -> Phase:
        """The phase that a step, counted from 0, belongs to."""
        return next((phase for phase in self.phases if step < phase.stop_step), self.phases[-1])

    def batches(self, start_step: int, stop_step: int) -> Iterator[MicroBatch]:
        """The micro batches of steps start_step to stop_step - 1, read ahead in the background."""
        while start_step < stop_step:
            phase = self.phase_of(start_step)
            stop = stop_step if phase is self.phases[-1] else min(stop_step, phase.stop_step)
            first = phase.first_step
            for batch in phase.loader.batches(start_step - first, stop - first):
                yield replace(batch, step=batch.step + first)
            start_step = stop

    def mask(self, input_ids: torch.Tensor, window_ids: torch.Tensor, epoch: int) -> MaskedBatch:
        """Masks of (B, L) windows on their device, by the phase whose length they have."""
        return self._maskers[input_ids.shape[1]](input_ids, window_ids, epoch)

    def tokens_before(self, step: int, left_out: Sequence[int] = ()) -> int:
        """Tokens of all global batches before a step but those of the steps left out, [CLS] and [SEP] included."""
        return sum(
            (steps - sum(phase.first_step <= each < phase.first_step + steps for each in left_out))
            * phase.loader.order.global_batch_size
            * phase.sequence_length
            for phase, steps in self._steps_before(step)
        )

    def epochs_before(self, step: int) -> float:
        """Passes over the corpus before a step."""
        return sum(steps / phase.loader.steps_per_epoch for phase, steps in self._steps_before(step))

    def window_ids(self, step: int) -> np.ndarray:
        """(global batch,) int64: the windows of a step, in the order of the global batch."""
        phase = self.phase_of(step)
        return phase.loader.order.window_ids(step - phase.first_step)

    def _steps_before(self, step: int) -> Iterator[tuple[Phase, int]]:
        for phase in self.phases:
            stop = step if phase is self.phases[-1] else min(step, phase.stop_step)
            yield phase, max(0, stop - phase.first_step)


def fit_micro_batch(config: Config, world_size: int) -> Config:
    """The recipe with a micro batch that `world_size` ranks share its global batch with: at most the one it names, or
    the default. "auto" stays; where no micro batch fits the ranks it is 1, and check_fit lists the numbers of ranks."""
    training = config.training
    if training.micro_batch_size == "auto":
        return config
    at_most = training.micro_batch_size or DEFAULT_MICRO_BATCH_SIZE
    size = largest_micro_batch(training.global_batch_size, config.data.lanes, world_size, at_most)
    return replace(config, training=replace(training, micro_batch_size=size or 1))


def build_run_data(
    config: Config, manifest: Manifest, *, rank: int = 0, world_size: int = 1, pin_memory: bool = False
) -> RunData:
    """The data of a recipe for one rank; UserError as in train/data/loader.py."""
    lengths, shares = planned_phases(config)
    loaders = [
        BatchLoader(
            config.data.shards,
            manifest,
            sequence_length=length,
            global_batch_size=config.training.global_batch_size,
            micro_batch_size=config.training.settled_micro_batch_size,
            seed=config.data.seed,
            lanes=config.data.lanes,
            rank=rank,
            world_size=world_size,
            verify=config.data.verify,
            cache_dir=config.data.cache_dir,
            pin_memory=pin_memory,
            check_at_start=length == lengths[0],
        )
        for length in lengths
    ]
    total = total_steps(config, [loader.steps_per_epoch for loader in loaders], shares)
    if total > MAX_STEPS:
        raise UserError(
            f"training.epochs={config.training.epochs}: {total:,} steps; give at most {MAX_STEPS:,}"
        )
    stops = phase_stops(total, shares)
    return RunData(
        [
            Phase(
                first,
                stop,
                length,
                loader,
                build_masker(config, manifest, length) if config.objective.needs_masks else NoMasking(),
            )
            for first, stop, length, loader in zip([0, *stops], stops, lengths, loaders, strict=False)
        ]
    )


def planned_phases(config: Config) -> tuple[list[int], list[float]]:
    """Sequence length and share of the steps of each phase of a recipe."""
    schedule, length = config.schedule, config.data.sequence_length
    if schedule.short_sequence_length is None:
        return [length], [1.0]
    return [schedule.short_sequence_length, length], [schedule.short_share, 1 - schedule.short_share]


def phase_stops(total: int, shares: list[float]) -> list[int]:
    """One past the last step of each phase; the last step belongs to the last phase, however few there are."""
    return [*(min(round(total * share), max(total - 1, 0)) for share in shares[:-1]), total]


def total_steps(config: Config, steps_per_epoch: list[int], shares: list[float]) -> int:
    """Steps of the run: as given, or as many as pass over the corpus `training.epochs` times.

    Args:
        steps_per_epoch: of each phase.
        shares: of the run's steps, by phase.
    """
    if config.training.max_steps is not None:
        return config.training.max_steps
    epochs = PUBLISHED_EPOCHS if config.training.epochs is None else config.training.epochs
    epochs_per_step = sum(share / steps for share, steps in zip(shares, steps_per_epoch, strict=True))
    return max(1, int(epochs / epochs_per_step + 1e-9))  # 3 / (1 / 49) is 146.99...


def build_schedule(config: Config, total: int) -> dict[str, Any]:
    """peak, warmup_steps, total_steps and decay_power for train/loop/schedule.py."""
    warmup = config.schedule.warmup_steps
    if warmup is not None and warmup > total:
        raise UserError(f"schedule.warmup_steps={warmup} is more than the run's {total} steps; give fewer")
    return {
        "peak": config.optimizer.lr,
        "warmup_steps": max(1, total // 40) if warmup is None else warmup,
        "total_steps": total,
        "decay_power": config.schedule.decay_power,
    }


def build_masker(config: Config, manifest: Manifest, sequence_length: int) -> Masker:
    """The masker of the recipe, with the corpus's token counts and word boundaries where it wants them."""
    rules, histogram, table, tokenizer = config.masking, None, None, manifest.tokenizer
    is_short = sequence_length == config.schedule.short_sequence_length
    if rules.smoothing > 0:
        histogram = read_histogram(config.data.shards, manifest)
    if rules.whole_word:
        ids = list(range(tokenizer.vocab_size))
        pieces = read_tokenizer(tokenizer_source(config)).convert_ids_to_tokens(ids)
        table = continuation_table(pieces, tokenizer.special_ids)
    return Masker(
        tokenizer,
        sequence_length,
        config.data.seed,
        probability=rules.probability,
        whole_word=table,
        histogram=histogram,
        smoothing=rules.smoothing,
        length_key="schedule.short_sequence_length" if is_short else "data.sequence_length",
    )
