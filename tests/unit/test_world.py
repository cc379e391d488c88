"""Which rank am I: the launcher's variables."""

from __future__ import annotations

import pytest

from train.world import discover_world


def test_no_launcher_is_one_rank() -> None:
    world = discover_world({})
    assert (world.rank, world.local_rank, world.world_size, world.local_size) == (0, 0, 1, 1)


def test_deepspeed_and_torchrun_variables() -> None:
    given = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        world = discover_world({**given, name: "4"})
        assert (world.rank, world.local_rank, world.world_size, world.local_size) == (5, 1, 8, 4)


def test_missing_variable_is_named() -> None:
    with pytest.raises(ValueError, match="not LOCAL_RANK, WORLD_SIZE"):
        discover_world({"RANK": "0"})


def test_contradiction_is_refused() -> None:
    with pytest.raises(ValueError, match="0 <= LOCAL_RANK <= RANK < WORLD_SIZE"):
        discover_world({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"})
