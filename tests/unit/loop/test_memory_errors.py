"""Out of memory while training says the micro batch, and what to set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from train.config import Config
from train.config_sections.training import TrainingConfig
from train.distributed.world import World
from train.errors import OutOfMemoryError, exit_code
from train.loop.memory_errors import explained_memory_errors, is_out_of_memory

WORLD = World(rank=1, local_rank=1, world_size=8, local_size=8, device="cuda:1")
CONFIG = Config(training=TrainingConfig(global_batch_size=4096, micro_batch_size=32))


def message_of(error: RuntimeError, config: Config = CONFIG) -> str:
    with (
        pytest.raises(OutOfMemoryError) as raised,
        explained_memory_errors(lambda: config, WORLD, lambda: "section 7, student"),
    ):
        raise error
    assert raised.value.__cause__ is error
    assert exit_code(raised.value) == 1
    return str(raised.value)


def test_the_micro_batch_and_what_to_set_are_named() -> None:
    said = message_of(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 1 has ...")
    )
    assert said.startswith("rank 1 on ")
    assert "is out of memory on cuda:1, in section 7, student, with training.micro_batch_size=32 of" in said
    assert (
        "set training.micro_batch_size lower (16, 8, 4, 2 fit the global batch), and --checkpoint.allow_"
        in said
    )
    assert said.endswith("(CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has ...)")


def test_smaller_than_what_auto_has_found() -> None:
    auto = replace(CONFIG, training=replace(CONFIG.training, micro_batch_size="auto"))
    settled = iter([replace(auto, training=replace(auto.training, micro_batch_size=64))])
    with (
        pytest.raises(OutOfMemoryError, match=r"micro_batch_size=64 .* lower \(32, 16, 8, 4 fit"),
        explained_memory_errors(lambda: next(settled), WORLD, lambda: "student"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_nothing_smaller_fits() -> None:
    config = replace(CONFIG, training=replace(CONFIG.training, micro_batch_size=1))
    assert "shorten data.sequence_length, or take a device with more memory" in message_of(
        RuntimeError("CUDA error: out of memory"), config
    )


def test_the_host_s_own_memory() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


def test_other_errors_stay_as_they_are() -> None:
    error = RuntimeError("The size of tensor a (3) must match")
    with pytest.raises(RuntimeError) as raised, explained_memory_errors(lambda: CONFIG, WORLD, lambda: ""):
        raise error
    assert raised.value is error
