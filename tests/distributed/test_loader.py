"""Real ranks: batches and masks that no world size, micro batch or restart changes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed.ranks.harness import run_ranks
from tests.distributed.workers.loader import SETTINGS, masked_rows
from tests.tiny_shards import write_tiny_shards

STEPS_PER_EPOCH = 95
PLANS = [(8, 4), (8, 1), (4, 8), (4, 2), (2, 16), (2, 1)]  # world size, micro batch size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("shards")
    assert write_tiny_shards(path, shards=9, documents=200)
    return str(path)


@pytest.fixture(scope="module")
def alone(folder: str) -> dict[int, bytes]:
    return masked_rows(folder, 32, 0, 1)


def test_no_world_size_micro_batch_or_restart_changes_batches_or_masks(
    folder: str, alone: dict[int, bytes]
) -> None:
    ranks = run_ranks("tests.distributed.workers.loader:serve", 8, folder, PLANS)
    for plan, (world_size, _) in enumerate(PLANS):
        assert {step: b"".join(rows[plan][step] for rows in ranks[:world_size]) for step in alone} == alone


def test_the_restarts_cross_an_epoch_and_no_window_comes_twice_in_one(alone: dict[int, bytes]) -> None:
    ids = {
        step: np.frombuffer(rows, dtype=np.int64).reshape(SETTINGS["global_batch_size"], -1)[:, -1].tolist()
        for step, rows in alone.items()
    }
    epochs = [[i for step in ids for i in ids[step] if step // STEPS_PER_EPOCH == epoch] for epoch in (0, 1)]
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
    assert set(epochs[0]) & set(epochs[1])
