"""The search behind training.micro_batch_size=auto, with a made-up memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.shard_format.manifest import Manifest
from train.config import Config, DataConfig, TrainingConfig
from train.data.order import check_fit
from train.distributed.world import World
from train.engine_config import ROOT, engine_settings, read_engine_config
from train.loop.micro_batch import candidates, engine_bytes, find_micro_batch_size, largest_fitting
from train.run_folder import found_before, write_configs

CPU = World(rank=0, local_rank=0, world_size=1, local_size=1, device="cpu")


def test_candidates_are_what_the_order_accepts() -> None:
    for world_size in (1, 2, 8, 64):
        sizes = candidates(4096, 64, world_size)
        assert sizes == sorted(sizes)
        assert sizes[-1] == 4096 // world_size
        for size in sizes:
            assert check_fit(4096, 64, world_size, size) * size * world_size == 4096
    assert candidates(4096, 64, 3) == []
    assert candidates(12, 64, 4) == [1, 3]


def test_the_largest_that_fits_is_found_with_few_trials() -> None:
    sizes = candidates(4096, 64, 1)
    for limit in (0, 1, 3, 64, 100, 4095, 4096):
        tried: list[int] = []

        def fits(size: int, tried: list[int] = tried, limit: int = limit) -> bool:
            tried.append(size)
            return size <= limit

        expected = max((size for size in sizes if size <= limit), default=None)
        assert largest_fitting(sizes, fits) == expected
        assert len(tried) <= 4


def test_engine_bytes_of_distilbert() -> None:
    engine = engine_settings(read_engine_config(ROOT / "ds_configs" / "fp16.json"))
    assert engine_bytes(66_985_530, 1, engine) == 16 * 66_985_530 + 2 * 2 * 50_000_000
    assert engine_bytes(66_985_530, 8, engine) == 16 * 8_373_192 + 2 * 2 * 50_000_000


def test_without_a_gpu_it_asks_for_a_number(shards_folder: str) -> None:
    config = Config(training=TrainingConfig(micro_batch_size="auto"), data=DataConfig(shards=shards_folder))
    with pytest.raises(ValueError, match="there is none here: give a number"):
        find_micro_batch_size(config, Manifest.load(shards_folder), CPU, {})
    with pytest.raises(ValueError, match="is found when training starts; give a number here"):
        _ = config.training.settled_micro_batch_size


def test_a_later_start_keeps_what_the_first_one_found(tmp_path: Path) -> None:
    auto = Config(training=TrainingConfig(micro_batch_size="auto"))
    assert found_before(tmp_path, auto) == auto
    write_configs(tmp_path, Config(training=TrainingConfig(micro_batch_size=128)), {}, {})
    assert found_before(tmp_path, auto).training.micro_batch_size == 128
    given = Config(training=TrainingConfig(micro_batch_size=64))
    assert found_before(tmp_path, given) == given
