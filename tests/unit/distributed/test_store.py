"""Ranks that do not come are named."""

from __future__ import annotations

import platform
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from train.distributed.rendezvous import free_port
from train.distributed.store import _try_connections, join_store, of_this_attempt
from train.errors import RendezvousError, ReportedElsewhereError


def test_ranks_that_cannot_connect_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A firewall that lets rank 0's port through and no other: here rank 2's server takes nobody."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,other")
    port = free_port()
    with ThreadPoolExecutor() as pool:
        stores = [pool.submit(join_store, rank, 3, "127.0.0.1", port, 20) for rank in range(3)]
        assert all(store.result() for store in stores)

        connect = socket.create_connection

        def blocked(where: tuple[str, int], timeout: float) -> socket.socket:
            if where[1] == port_of_2():
                raise TimeoutError("timed out")
            return connect(where, timeout=timeout)

        def port_of_2() -> int:
            return int(store_of_0.result().get("halfling-at/2").split()[1])

        monkeypatch.setattr("train.distributed.store.socket.create_connection", blocked)
        port = free_port()
        store_of_0 = pool.submit(dist.TCPStore, "127.0.0.1", port, 3, True, wait_for_workers=False)
        found = [pool.submit(rest_of_joining, rank, port) for rank in range(3)]
        errors = [one.exception() for one in found]
    assert [type(error) for error in errors] == [RendezvousError, *2 * [ReportedElsewhereError]]
    message = str(errors[0])
    expected = (
        rf"rank 1 on {platform.node()} cannot connect to rank 2 on {platform.node()} at 127.0.0.1, port \d+ "
    )
    assert re.match(expected + r"\(timed out\): open all ports between the hosts", message), message
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib9")
    with pytest.raises(
        ValueError, match=r"GLOO_SOCKET_IFNAME=ib9: \S+ has no such network interface .* it has lo"
    ):
        join_store(0, 1, "127.0.0.1", free_port(), 20)


def rest_of_joining(rank: int, port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, 3, False)
    store.set(f"halfling-here/{rank}", platform.node())
    _try_connections(store, rank, 3, "lo", timedelta(seconds=20))


def test_the_missing_rank_is_named() -> None:
    port = free_port()
    with ThreadPoolExecutor() as pool:
        found = [pool.submit(join_store, rank, 3, "127.0.0.1", port, 2) for rank in (0, 2)]
        with pytest.raises(
            RendezvousError, match=r"rank 1 did not come within 2 s of the start \(rank 2, on "
        ):
            found[0].result()
        assert isinstance(found[1].exception(), ReportedElsewhereError)


def test_rank_0_that_is_not_there() -> None:
    with pytest.raises(
        RendezvousError, match=r"rank 1 on \S+ could not reach rank 0 at 127\.0\.0\.1, port \d+, within 1"
    ):
        join_store(1, 2, "127.0.0.1", free_port(), 1)


def test_a_taken_port() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} of .* is in use, perhaps by another job"):
            join_store(0, 2, "127.0.0.1", port, 1)


def test_a_rank_of_another_job_is_refused() -> None:
    """Its own rank 0 could not open the port and has ended; it would wait for its peers in the first job's store."""
    port = free_port()
    with ThreadPoolExecutor() as pool:
        first = [pool.submit(join_store, rank, 2, "127.0.0.1", port, 20) for rank in range(2)]
        stores = [came.result() for came in first]
        with pytest.raises(
            ValueError, match=rf"port {port} of 127\.0\.0\.1, .* is in use, perhaps by another job"
        ):
            join_store(1, 2, "127.0.0.1", port, 20)
        assert stores[0].get("halfling-here/1").decode() == platform.node()


def test_ranks_of_a_larger_job_are_refused() -> None:
    """On other hosts, by numbers that nobody has in the first job's store."""
    port = free_port()
    with ThreadPoolExecutor() as pool:
        first = [pool.submit(join_store, rank, 2, "127.0.0.1", port, 20) for rank in range(2)]
        stores = [came.result() for came in first]
        with pytest.raises(ValueError, match=rf"port {port} of 127\.0\.0\.1, .* is in use, perhaps by"):
            join_store(2, 4, "127.0.0.1", port, 2)
        assert stores[0].get("halfling-here/1").decode() == platform.node()


def test_torchrun_keeps_one_store_for_all_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = dist.HashStore()
    monkeypatch.setattr(dist, "TCPStore", lambda *args, **options: kept)
    for attempt in "01":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        assert not of_this_attempt(kept).check(["halfling-here/0"])
        assert join_store(0, 1, "127.0.0.1", 1, 2).check(["halfling-here/0"])


def test_a_rank_that_dies_before_the_connections_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")

    def only_rank_0(store: dist.Store, rank: int, *others: Any) -> None:
        if rank == 0:
            _try_connections(store, rank, *others)

    monkeypatch.setattr("train.distributed.store._try_connections", only_rank_0)
    port = free_port()
    with ThreadPoolExecutor() as pool:
        found = [pool.submit(join_store, rank, 2, "127.0.0.1", port, 2) for rank in range(2)]
        with pytest.raises(RendezvousError, match=r"rank 0 on \S+ lost another rank while the job started"):
            found[0].result()


def test_a_host_that_nobody_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.distributed.store.RESOLVE_S", 0.0)
    with pytest.raises(ValueError, match=r"does not know the host nosuch\.invalid, the ranks' rendezvous \("):
        join_store(1, 2, "nosuch.invalid", free_port(), 20)
