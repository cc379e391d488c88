"""One or two sequence lengths in a run: which step has which batch, and how far a step has come."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_prep.shard_format.manifest import Manifest
from train.config import Config
from train.config_sections.data import DataConfig, MaskingConfig
from train.config_sections.training import ScheduleConfig, TrainingConfig
from train.data.pipeline import RunData, build_run_data, build_schedule, phase_stops, total_steps

GLOBAL, SHORT, LONG = 16, 16, 32


@pytest.fixture
def config(shards_folder: str) -> Config:
    return Config(
        data=DataConfig(shards=shards_folder, sequence_length=LONG),
        masking=MaskingConfig(smoothing=0.0),
        schedule=ScheduleConfig(short_sequence_length=SHORT, short_share=0.75),
        training=TrainingConfig(global_batch_size=GLOBAL, micro_batch_size=4, max_steps=8),
    )


@pytest.fixture
def data(config: Config) -> RunData:
    return build_run_data(config, Manifest.load(config.data.shards))


def test_the_long_phase_follows_the_short_one(data: RunData) -> None:
    batches = list(data.batches(0, 8))
    assert [batch.step for batch in batches] == [step for step in range(8) for _ in range(4)]
    assert [batch.input_ids.shape[1] for batch in batches] == [SHORT] * 24 + [LONG] * 8
    masked = data.mask(batches[0].input_ids, batches[0].window_ids, 0)
    assert masked.positions.shape == (4, round(0.15 * SHORT))
    masked = data.mask(batches[-1].input_ids, batches[-1].window_ids, 0)
    assert masked.positions.shape == (4, round(0.15 * LONG))


def test_each_phase_is_a_plain_order_of_its_own(config: Config, data: RunData) -> None:
    manifest = Manifest.load(config.data.shards)
    for length, first in ((SHORT, 0), (LONG, 6)):
        alone = replace(config, schedule=ScheduleConfig(), data=replace(config.data, sequence_length=length))
        expected = list(build_run_data(alone, manifest).batches(0, 2))
        got = list(data.batches(first, first + 2))
        for one, other in zip(expected, got, strict=True):
            assert one.step + first == other.step
            assert torch.equal(one.input_ids, other.input_ids)


@pytest.mark.parametrize("start", [0, 3, 5, 6, 7])
def test_a_restart_serves_the_same_steps(data: RunData, start: int) -> None:
    whole = [batch for batch in data.batches(0, 8) if batch.step >= start]
    again = list(data.batches(start, 8))
    assert len(again) == len(whole)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(again, whole, strict=True))


def test_both_phases_check_the_shards_once(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr("train.data.loader.check_shards", lambda *args, **kwargs: checked.append("once"))
    build_run_data(config, Manifest.load(config.data.shards))
    assert checked == ["once"]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_window_ids_of_a_step_are_those_that_the_ranks_serve(config: Config, world_size: int) -> None:
    manifest = Manifest.load(config.data.shards)
    ranks = [build_run_data(config, manifest, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 5, 6, 40):
        served = [batch.window_ids for data in ranks for batch in data.batches(step, step + 1)]
        assert np.array_equal(ranks[0].window_ids(step), torch.cat(served).numpy())


def test_tokens_and_epochs_count_both_phases(data: RunData) -> None:
    short, long = (phase.loader.steps_per_epoch for phase in data.phases)
    assert [data.tokens_before(step) for step in (0, 1, 6, 7)] == [0, 256, 1536, 1536 + 512]
    assert data.epochs_before(7) == pytest.approx(6 / short + 1 / long)


def test_epochs_are_passes_over_the_corpus_in_either_length(config: Config) -> None:
    by_epochs = replace(config, training=replace(config.training, max_steps=None, epochs=2.0))
    data = build_run_data(by_epochs, Manifest.load(config.data.shards))
    assert data.epochs_before(data.total_steps) == pytest.approx(2.0, abs=0.2)
    one_phase = replace(by_epochs, schedule=ScheduleConfig())
    for steps in (7, 49, 147):
        assert total_steps(one_phase, [steps], [1.0]) == 2 * steps


def test_warmup_longer_than_the_run_is_refused(config: Config) -> None:
    long = replace(
        config, schedule=ScheduleConfig(warmup_steps=9), training=replace(config.training, max_steps=None)
    )
    with pytest.raises(ValueError, match="warmup_steps=9 is more than the run's 8 steps"):
        build_schedule(long, 8)


def test_the_last_step_has_the_full_length() -> None:
    stops = [phase_stops(total, [0.9, 0.1])[0] for total in range(8)]
    assert stops == [0, 0, 1, 2, 3, 4, 5, 6]
    assert phase_stops(100, [0.9, 0.1]) == [90, 100]


def test_too_few_masks_in_short_sequences_are_named_by_their_length(config: Config) -> None:
    few = replace(config, masking=MaskingConfig(smoothing=0.0, probability=0.03))
    with pytest.raises(ValueError, match=r"probability 0.03 of schedule.short_sequence_length 16 is 0 pos"):
        build_run_data(few, Manifest.load(config.data.shards))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"short_sequence_length": LONG}, "give less than data.sequence_length=32"),
        ({"short_sequence_length": 4}, "give at least 8"),
        ({"short_share": 0.5}, "has no effect without schedule.short_sequence_length"),
        ({"short_sequence_length": SHORT, "short_share": 1.0}, "give a share between 0 and 1"),
    ],
)
def test_impossible_lengths_are_refused(schedule: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(data=DataConfig(sequence_length=LONG), schedule=ScheduleConfig(**schedule))  # type: ignore[arg-type]
