"""Ranks that do not come are named."""

from __future__ import annotations

import platform
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.distributed.harness import free_port
from train.errors import LostRankError
from train.meeting import meet


def test_all_come() -> None:
    port = free_port()
    with ThreadPoolExecutor() as pool:
        stores = [pool.submit(meet, rank, 3, "127.0.0.1", port, 20) for rank in range(3)]
        for rank, store in enumerate(stores):
            assert store.result().get(f"halfling-here/{rank}") == platform.node().encode()


def test_the_missing_rank_is_named() -> None:
    port = free_port()
    with ThreadPoolExecutor() as pool:
        found = [pool.submit(meet, rank, 3, "127.0.0.1", port, 2) for rank in (0, 2)]
        with pytest.raises(LostRankError, match=r"rank 1 did not come within 2 s of the start \(rank 2, on "):
            found[0].result()
        with pytest.raises(LostRankError, match=r"rank 1 did not come|lost rank 0"):
            found[1].result()


def test_rank_0_that_is_not_there() -> None:
    with pytest.raises(
        LostRankError, match=r"rank 1 on \S+ could not reach rank 0 at 127\.0\.0\.1, port \d+, within 1"
    ):
        meet(1, 2, "127.0.0.1", free_port(), 1)


def test_a_taken_port() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} of .* is in use, perhaps by another job"):
            meet(0, 2, "127.0.0.1", port, 1)
