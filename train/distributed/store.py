"""The ranks join the store that rank 0 holds; one that does not come is named, instead of waited for in silence.

Then each opens a connection to the next, at a port of the system's choice, as gloo and NCCL will: behind a firewall
that lets only rank 0's port through, gloo would try for five times its timeout without a word.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import socket
import time
from collections.abc import Mapping
from datetime import timedelta

import psutil
import torch.distributed as dist

from train.distributed.collective_errors import cause_of
from train.errors import RankError, RendezvousError, ReportedElsewhereError, UserError

# Between the first rank's and the last rank's arrival: a slow file system takes minutes to import torch.
WAIT_S = 600.0
RESOLVE_S = 5.0
"""A name server may be slow to answer when a cluster has just started."""
HOST_KEY = "halfling-here/{}"
WORLD_SIZE_KEY = "halfling-world-size"
"""By rank; its value is the name of the host."""
SHOWN = 10
CONNECT_S = 20.0
"""A lost packet of a TCP handshake is sent again after 1, 3, 7 and 15 s."""


def join_store(rank: int, world_size: int, address: str, port: int, wait_s: float = WAIT_S) -> dist.Store:
    """The job's store, when all ranks are there.

    Raises:
        RankError: rank 0's port is taken, another job's ranks use it, or its host's name is not known.
        RendezvousError: a rank did not come, or rank 0 or another rank cannot be reached, within `wait_s`.
    """
    wait = timedelta(seconds=wait_s)
    _resolve(address)
    try:
        joined = dist.TCPStore(address, port, world_size, rank == 0, timeout=wait, wait_for_workers=False)
    except dist.DistError as error:
        if rank == 0 and _port_is_taken(error):
            raise RankError(_port_in_use(address, port)) from None
        raise RendezvousError(
            f"rank {rank} on {platform.node()} could not reach rank 0 at {address}, port {port}, within "
            f"{wait_s:.0f} s: did it start, does a firewall stand between (docs/CLUSTER.md)? Run again"
        ) from None
    store = of_this_attempt(joined)
    keys = [HOST_KEY.format(number) for number in range(world_size)]
    try:
        # A larger job's ranks on other hosts have numbers that are free here.
        if rank == 0:
            store.set(WORLD_SIZE_KEY, str(world_size))
        is_ours = store.get(WORLD_SIZE_KEY) == str(world_size).encode()  # waits for rank 0
        if not is_ours or store.add(f"halfling-joined/{rank}", 1) > 1:
            raise RankError(_port_in_use(address, port))
        store.set(keys[rank], platform.node())
        store.wait(keys, wait)
    except dist.DistError:
        raise _missing(store, keys, rank, wait_s) from None
    interface = os.environ.get("GLOO_SOCKET_IFNAME")  # set by world.py where there are several hosts
    if interface:
        try:
            _try_connections(store, rank, world_size, interface.split(",")[0], wait)
        except dist.DistError as error:
            raise _lost_another(rank, error) from error
    return store


def of_this_attempt(store: dist.Store) -> dist.Store:
    """`store` without what an earlier start left in it: torchrun keeps one for all its restarts."""
    return dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def compare_versions(
    store: dist.Store, rank: int, world_size: int, versions: Mapping[str, str], wait_s: float = WAIT_S
) -> None:
    """All ranks run the same Python and packages, by their exact versions: others round otherwise, or draw other
    dropout, or cannot read each other's messages.

    Args:
        versions: by package.
    Raises:
        UserError, RendezvousError: as `compare_devices`.
    """
    answers, hosts = _exchanged(store, "versions", rank, world_size, json.dumps(versions), wait_s)
    found = [json.loads(answer) for answer in answers]
    differences = [
        f"{name}: rank {number} on {hosts[number]} has {other.get(name)}, rank 0 on {hosts[0]} has {version}"
        for name, version in found[0].items()
        for number, other in enumerate(found)
        if other.get(name) != version
    ]
    if differences:
        fault = UserError(
            "the ranks run different versions; install requirements.txt in one environment on every host:\n  "
            + "\n  ".join(differences[:SHOWN])
        )
        raise _reported_by_rank_0(rank, fault)


def compare_devices(
    store: dist.Store, rank: int, world_size: int, kind: str, uuid: str, wait_s: float = WAIT_S
) -> None:
    """All ranks compute on the same kind of device, and none shares its GPU: NCCL would hang, or say neither.

    Args:
        kind: "cuda" or "cpu".
        uuid: of the GPU.
    Raises:
        UserError: otherwise; on rank 0, and as ReportedElsewhereError on the others.
        RendezvousError: a rank that had joined is gone, and was waited for `wait_s`.
    """
    devices, hosts = _exchanged(store, "device", rank, world_size, f"{kind} {uuid}", wait_s)
    kinds = [device.split()[0] for device in devices]
    if len(set(kinds)) > 1:
        odd, other = kinds.index("cpu"), kinds.index("cuda")
        fault = UserError(
            f"rank {odd} on {hosts[odd]} computes on the CPU, rank {other} on {hosts[other]} on a GPU: run "
            f"launch/doctor.py on {hosts[odd]}, or set DS_ACCELERATOR to the same on every host (cluster.env)"
        )
        raise _reported_by_rank_0(rank, fault)
    if kind == "cpu":
        return
    for number, device in enumerate(devices):
        first = devices.index(device)
        if first < number:
            fault = UserError(
                f"ranks {first} and {number} on {hosts[number]} have the same GPU ({device.split()[1]}): start one "
                "rank per GPU (--gpus-per-node=N and --ntasks-per-node=N in Slurm, slots= in the hostfile)"
            )
            raise _reported_by_rank_0(rank, fault)


def _port_in_use(address: str, port: int) -> str:
    return (
        f"port {port} of {address}, the ranks' rendezvous, is in use, perhaps by another job: choose another "
        "(deepspeed --master_port, or MASTER_PORT)"
    )


def _exchanged(
    store: dist.Store, what: str, rank: int, world_size: int, value: str, wait_s: float
) -> tuple[list[str], list[str]]:
    """Every rank's value, and its host."""
    keys = [f"halfling-{what}/{number}" for number in range(world_size)]
    names = [HOST_KEY.format(number) for number in range(world_size)]
    try:
        store.set(keys[rank], value)
        store.wait(keys, timedelta(seconds=wait_s))
        values, hosts = ([value.decode() for value in store.multi_get(asked)] for asked in (keys, names))
    except dist.DistError as error:
        raise _lost_another(rank, error) from error
    return values, hosts


def _lost_another(rank: int, error: Exception) -> RendezvousError:
    return RendezvousError(
        f"rank {rank} on {platform.node()} lost another rank while the job started ({cause_of(error)}); run again"
    )


def _resolve(address: str) -> None:
    """RankError where nothing here knows rank 0's host by that name: torch would ask again and again, in silence."""
    deadline = time.monotonic() + RESOLVE_S
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RankError(
                    f"{platform.node()} does not know the host {address}, the ranks' rendezvous "
                    f"({error.strerror}): correct MASTER_ADDR, or the hosts' names in /etc/hosts or the name server"
                ) from None
            time.sleep(1.0)


def _try_connections(store: dist.Store, rank: int, world_size: int, interface: str, wait: timedelta) -> None:
    """Each rank connects to the next; RendezvousError where one of them cannot."""
    address = _address_of(interface)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as server:
        store.set(f"halfling-at/{rank}", f"{address} {server.getsockname()[1]}")
        other = (rank + 1) % world_size
        store.wait([f"halfling-at/{other}"], wait)
        where, port = store.get(f"halfling-at/{other}").decode().split()
        try:
            socket.create_connection((where, int(port)), timeout=CONNECT_S).close()
            fault = ""
        except OSError as error:
            fault = (
                f"rank {rank} on {platform.node()} cannot connect to rank {other} on "
                f"{store.get(HOST_KEY.format(other)).decode()} at {where}, port {port} ({error.strerror or error}): "
                "open all ports between the hosts (firewall, security group), or set GLOO_SOCKET_IFNAME to another "
                "network interface; launch/doctor.py --hostfile tries this too"
            )
        store.set(f"halfling-fault/{rank}", fault)
        keys = [f"halfling-fault/{number}" for number in range(world_size)]
        store.wait(keys, wait)  # and so nobody's server closes too early
    faults = [found.decode() for found in store.multi_get(keys) if found]
    if faults:
        raise _reported_by_rank_0(rank, RendezvousError(faults[0]))


def _address_of(interface: str) -> str:
    """RankError where this host has no such interface, or it has no address."""
    entries = psutil.net_if_addrs().get(interface, [])
    for family in (socket.AF_INET, socket.AF_INET6):
        for entry in entries:
            if entry.family == family and not entry.address.startswith("fe80:"):
                return entry.address
    raise RankError(
        f"GLOO_SOCKET_IFNAME={interface}: {platform.node()} has no such network interface with an address; it has "
        f"{', '.join(psutil.net_if_addrs())}"
    )


def _missing(store: dist.Store, keys: list[str], rank: int, wait_s: float) -> Exception:
    try:
        here = [store.check([key]) for key in keys]
    except dist.DistError:
        return RendezvousError(
            f"rank {rank} on {platform.node()} lost rank 0 while it waited for the others; run again"
        )
    missing = ", ".join(str(number) for number, joined in enumerate(here) if not joined)
    last = max(number for number, joined in enumerate(here) if joined)
    host = store.get(keys[last]).decode()
    error = RendezvousError(
        f"rank {missing} did not come within {wait_s:.0f} s of the start (rank {last}, on {host}, did): did its host "
        "start it? `ssh HOST true` must work for each host of the hostfile without a password. Run again"
    )
    return _reported_by_rank_0(rank, error)


def _reported_by_rank_0(rank: int, error: Exception) -> Exception:
    """Rank 0, whose store answers, meets the same error."""
    if rank == 0:
        return error
    elsewhere = ReportedElsewhereError()
    elsewhere.__cause__ = error
    return elsewhere


def _port_is_taken(error: Exception) -> bool:
    return "EADDRINUSE" in str(error) or f"errno: {errno.EADDRINUSE}" in str(error)
