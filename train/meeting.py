"""The ranks meet at rank 0's store; one that does not come is named, instead of waited for in silence."""

from __future__ import annotations

import errno
import platform
from datetime import timedelta

import torch.distributed as dist

from train.errors import LostRankError

# Between the first rank's and the last rank's arrival: a slow file system takes minutes to import torch.
WAIT_S = 600.0


def meet(rank: int, world_size: int, address: str, port: int, wait_s: float = WAIT_S) -> dist.Store:
    """The job's store, when all ranks are there.

    Raises:
        ValueError: rank 0's port is taken.
        LostRankError: a rank did not come, or rank 0 cannot be reached, within `wait_s`.
    """
    wait = timedelta(seconds=wait_s)
    try:
        store = dist.TCPStore(address, port, world_size, rank == 0, timeout=wait, wait_for_workers=False)
    except dist.DistError as error:
        if rank == 0 and _port_is_taken(error):
            raise ValueError(
                f"port {port} of {platform.node()}, where the ranks should meet, is in use, perhaps by another job: "
                "choose another (deepspeed --master_port, or MASTER_PORT)"
            ) from None
        raise LostRankError(
            f"rank {rank} on {platform.node()} could not reach rank 0 at {address}, port {port}, within "
            f"{wait_s:.0f} s: did it start, does a firewall stand between (docs/CLUSTER.md)? Run again"
        ) from None
    keys = [f"halfling-here/{number}" for number in range(world_size)]
    try:
        store.set(keys[rank], platform.node())
        store.wait(keys, wait)
    except dist.DistError:
        raise LostRankError(_who_is_missing(store, keys, rank, wait_s)) from None
    return store


def _who_is_missing(store: dist.Store, keys: list[str], rank: int, wait_s: float) -> str:
    try:
        here = [store.check([key]) for key in keys]
    except dist.DistError:
        return f"rank {rank} on {platform.node()} lost rank 0 while it waited for the others; run again"
    missing = ", ".join(str(number) for number, came in enumerate(here) if not came)
    last = max(number for number, came in enumerate(here) if came)
    host = store.get(keys[last]).decode()
    return (
        f"rank {missing} did not come within {wait_s:.0f} s of the start (rank {last}, on {host}, did): did its host "
        "start it? `ssh HOST true` must work for each host of the hostfile without a password. Run again"
    )


def _port_is_taken(error: Exception) -> bool:
    return "EADDRINUSE" in str(error) or f"errno: {errno.EADDRINUSE}" in str(error)
