"""One message for one error, however many ranks meet it.

The launchers of DeepSpeed and MPI end the other ranks as soon as rank 0 has ended, so these only have to wait. srun
lets them run on (made to end them, with --kill-on-bad-exit, it would also end ranks that are just about to report 75,
and report a kill instead), those of DeepSpeed and torchrun do so on other hosts, and ranks started by hand have
none: there they ask rank 0, at a port that follows from the job's id, or from the one at which they meet.
"""

from __future__ import annotations

import hashlib
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from train.distributed.discovery import NUM_JOB_PORTS, discover_ranks, probable_rank
from train.distributed.rendezvous import rendezvous

SECONDS_FOR_RANK_0 = 10.0
ASK_EVERY_S = 0.1
LAST_PRIVILEGED_PORT = 1023


def tell(message: str, environment: Mapping[str, str], others_know: bool = False) -> None:
    """Print `message` to stderr on rank 0, and on another rank only where rank 0 has not told the same.

    `others_know` on rank 0: nobody will ask (train/distributed/heartbeat.py has let them know).
    """
    rank = probable_rank(environment)
    place = _place_to_ask(environment)
    if rank != 0 and place is not None:
        if _rank_0_told(message, place[:2]):
            return
    elif rank != 0:
        time.sleep(SECONDS_FOR_RANK_0)
    print(message, file=sys.stderr, flush=True)
    if rank == 0 and place is not None and not others_know:
        _answer(message, *place)


def _place_to_ask(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """Rank 0's address, its port for questions, and how many may ask; None where its end ends the others."""
    try:
        ranks = discover_ranks(environment)
        several_hosts = ranks.local_size < ranks.world_size
        if ranks.launcher == "srun":
            given = ("MASTER_ADDR", "MASTER_PORT")
            environment = {name: value for name, value in environment.items() if name not in given}
        elif ranks.launcher in ("none", "mpirun") or (ranks.launcher != "environment" and not several_hosts):
            return None
        address, port = rendezvous(environment, ranks)
    except ValueError:  # then that is the error to be told
        return None
    port += -NUM_JOB_PORTS if port > LAST_PRIVILEGED_PORT + NUM_JOB_PORTS else NUM_JOB_PORTS
    return address, port, ranks.world_size - 1


def _digest(message: str) -> bytes:
    return hashlib.sha256(message.encode()).digest()


def _answer(message: str, address: str, port: int, others: int) -> None:
    """Serve the message's digest until all have asked, or would have given up."""
    deadline = time.monotonic() + SECONDS_FOR_RANK_0
    try:
        with socket.create_server(("", port)) as server:
            while others > 0 and time.monotonic() < deadline:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                connection: Any = server.accept()[0]
                with connection:
                    connection.sendall(_digest(message))
                others -= 1
    except OSError:  # nobody came, or the port is taken: then the others tell it themselves
        return


def _rank_0_told(message: str, where: tuple[str, int]) -> bool:
    deadline = time.monotonic() + SECONDS_FOR_RANK_0
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(where, timeout=SECONDS_FOR_RANK_0) as connection:
                return connection.recv(64) == _digest(message)
        except OSError:
            time.sleep(ASK_EVERY_S)
    return False
