"""The search behind training.micro_batch_size=auto, with a made-up memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.shard_format.manifest import Manifest
from train.config import Config
from train.config_sections.data import DataConfig
from train.config_sections.model import ModelConfig
from train.config_sections.objective import ObjectiveConfig
from train.config_sections.training import TrainingConfig
from train.data.order import check_fit, fitting_micro_batches
from train.data.pipeline import fit_micro_batch
from train.distributed.world import World
from train.engine_config import ROOT, engine_settings, read_engine_config
from train.errors import UserError
from train.loop import micro_batch
from train.loop.micro_batch import _trial, engine_bytes, find_micro_batch_size, largest_fitting
from train.models.attention_vectors import RecordedLinear
from train.objective import distillation
from train.objective.chunk_terms import DecoderInputs
from train.run_folder import changed_config, found_before, write_configs

CPU = World(rank=0, local_rank=0, world_size=1, local_size=1, device="cpu")


def test_micro_batches_are_what_the_order_accepts() -> None:
    for world_size in (1, 2, 8, 64):
        sizes = fitting_micro_batches(4096, 64, world_size)
        assert sizes == sorted(sizes)
        assert sizes[-1] == 4096 // world_size
        for size in sizes:
            assert check_fit(4096, 64, world_size, size) * size * world_size == 4096
    assert fitting_micro_batches(4096, 64, 3) == []
    assert fitting_micro_batches(12, 64, 4) == [1, 3]


def test_the_largest_that_fits_is_found_with_few_trials() -> None:
    sizes = fitting_micro_batches(4096, 64, 1)
    for limit in (0, 1, 3, 64, 100, 4095, 4096):
        tried: list[int] = []

        def fits(size: int, tried: list[int] = tried, limit: int = limit) -> bool:
            tried.append(size)
            return size <= limit

        expected = max((size for size in sizes if size <= limit), default=None)
        assert largest_fitting(sizes, fits) == expected
        assert len(tried) <= 5
        assert tried[0] == 1  # kernels and library handles are loaded while there is room


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_trial_that_finds_no_memory_leaves_nothing_to_the_next(
    error: RuntimeError, shards_folder: str, teacher_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails in the loss over the vocabulary; the vectors of the relations, recorded before, hold the whole pass."""
    for name in ("empty_cache", "reset_peak_memory_stats", "memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**36, 2**36))
    loss, build, students = distillation.vocabulary_loss, micro_batch.build_student, []

    def limited(student: DecoderInputs, *others: Any, **named: Any) -> Any:
        if student.features.shape[0] > 2 * 16:
            raise error
        return loss(student, *others, **named)

    def noted(*arguments: Any) -> Any:
        students.append(build(*arguments))
        return students[0]

    monkeypatch.setattr(distillation, "vocabulary_loss", limited)
    monkeypatch.setattr(micro_batch, "build_student", noted)
    config = Config(
        model=ModelConfig(teacher=teacher_folder, layer_map="every_other"),
        data=DataConfig(shards=shards_folder, sequence_length=16),
        objective=ObjectiveConfig(relation_weight=1.0),
    )
    engine = read_engine_config(ROOT / "ds_configs" / "cpu.json")
    fits = _trial(config, Manifest.load(shards_folder), CPU, engine, ())
    assert [fits(size) for size in (2, 4, 2)] == [True, False, True]
    assert fits(4) is False
    recorded = [module for module in students[0].modules() if isinstance(module, RecordedLinear)]
    assert [module.outputs for module in recorded] == [(), (), ()]
    error.args = ("The size of tensor a (3) must match",)
    if not isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(RuntimeError, match="The size of tensor"):
            fits(4)


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


@pytest.mark.parametrize(("ranks", "expected"), [(1, 32), (2, 32), (4, 16), (8, 8), (64, 1)])
def test_the_default_adapts_to_the_ranks_and_an_explicit_one_is_told_what_fits(
    ranks: int, expected: int
) -> None:
    """README's distil command: 64 sequences."""
    config = Config(training=TrainingConfig(global_batch_size=64))
    assert fit_micro_batch(config, ranks).training.micro_batch_size == expected
    if expected < 32:
        with pytest.raises(
            UserError, match=rf"does not fit .*: give training.micro_batch_size={expected}, or use a"
        ):
            check_fit(64, 64, ranks, 32)


def test_what_no_micro_batch_can_mend_lists_the_ranks_that_fit() -> None:
    config = fit_micro_batch(Config(training=TrainingConfig(global_batch_size=64)), 3)
    with pytest.raises(
        UserError, match=r"world size of 3 does not fit .*: use a world size of 1, 2, 4, 8, 16, 32, 64"
    ):
        check_fit(64, 64, 3, config.training.settled_micro_batch_size)
    odd = fit_micro_batch(Config(training=TrainingConfig(global_batch_size=48)), 1)
    assert odd.training.micro_batch_size == 24


def test_going_on_with_other_ranks_keeps_the_micro_batch_as_far_as_it_fits(tmp_path: Path) -> None:
    """2 ranks with 32, 4 with 16, 2 again with 16: nothing of it is a change that would be refused."""
    command = Config(training=TrainingConfig(global_batch_size=64))
    for ranks, expected in ((2, 32), (4, 16), (2, 16)):
        found = found_before(tmp_path, command)
        assert changed_config(tmp_path, found) == []
        settled = fit_micro_batch(found, ranks)
        assert settled.training.micro_batch_size == expected
        write_configs(tmp_path, settled, {}, {})


def test_a_later_start_keeps_what_the_first_one_found(tmp_path: Path) -> None:
    auto = Config(training=TrainingConfig(micro_batch_size="auto"))
    assert found_before(tmp_path, auto) == auto
    write_configs(tmp_path, Config(training=TrainingConfig(micro_batch_size=128)), {}, {})
    assert found_before(tmp_path, auto).training.micro_batch_size == 128
    given = Config(training=TrainingConfig(micro_batch_size=64))
    assert found_before(tmp_path, given) == given
    other = Config(training=TrainingConfig(micro_batch_size="auto", global_batch_size=192))
    assert found_before(tmp_path, other) == other
    assert "training.global_batch_size: 4096 -> 192" in changed_config(tmp_path, other)
