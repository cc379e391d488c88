"""The processes that share a job: one, several on this machine, or the ranks of an MPI job.

All of them run the same function, which meets the others in `gather`. Nothing else is exchanged: claims,
progress and the wish to stop are small files in the work folder, which all of them see.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
POLL_S = 0.05


class JobFailed(Exception):
    """The job cannot go on; every process raises it, with the message of the lowest rank that failed."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ProcessLost(RuntimeError):
    """Another process of the job ended without a word."""


class World:
    """One process alone; and what the others have in common."""

    rank = 0
    size = 1

    def gather(self, value: Any, while_waiting: Callable[[], None] = lambda: None) -> list[Any]:
        """Every process's value, by rank, on every process. All must call it."""
        return [value]

    def check(self) -> None:
        """Raise ProcessLost where another process of the job is gone."""


def mpi_size() -> int:
    """The number of ranks that mpirun or srun started, 1 without them."""
    sizes = [int(os.environ[name]) for name in _MPI_SIZES if os.environ.get(name, "").isdigit()]
    if "PMIX_RANK" in os.environ and os.environ.get("SLURM_NTASKS", "").isdigit():
        sizes.append(int(os.environ["SLURM_NTASKS"]))
    return max(sizes, default=1)


class MpiWorld(World):
    """The ranks of MPI.COMM_WORLD. mpi4py is imported here only: other users need no MPI."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()

    def gather(self, value: Any, while_waiting: Callable[[], None] = lambda: None) -> list[Any]:
        # A blocking collective would spin on a core that another rank may be using.
        arrived = self._comm.Ibarrier()
        while not arrived.Test():
            while_waiting()
            time.sleep(POLL_S)
        gathered: list[Any] = self._comm.allgather(value)
        return gathered


class _Root(World):
    def __init__(self, children: list[multiprocessing.process.BaseProcess], pipes: list[Connection]) -> None:
        self.size = 1 + len(children)
        self._children = children
        self._pipes = pipes

    def gather(self, value: Any, while_waiting: Callable[[], None] = lambda: None) -> list[Any]:
        values = [value]
        for pipe in self._pipes:
            while not pipe.poll(POLL_S):
                while_waiting()
                self.check()
            try:
                values.append(pipe.recv())
            except EOFError:
                self._lost()
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send(values)
        return values

    def check(self) -> None:
        for child in self._children:
            if child.exitcode not in (None, 0):
                self._lost()

    def _lost(self) -> None:
        time.sleep(POLL_S)
        codes = [child.exitcode for child in self._children if child.exitcode not in (None, 0)]
        raise ProcessLost(
            f"a worker process ended unexpectedly (exit code {codes[0] if codes else 'unknown'}); "
            "run the same command again to go on"
            + (" (-9: killed, perhaps for memory: try fewer --processes)" if -9 in codes else "")
        )


class _Child(World):
    def __init__(self, rank: int, size: int, pipe: Connection) -> None:
        self.rank = rank
        self.size = size
        self._pipe = pipe
        self._parent = os.getppid()

    def gather(self, value: Any, while_waiting: Callable[[], None] = lambda: None) -> list[Any]:
        self._pipe.send(value)
        values: list[Any] = self._pipe.recv()
        return values

    def check(self) -> None:
        if os.getppid() != self._parent:
            raise ProcessLost("the first process is gone")


def _child_main(rank: int, size: int, pipe: Connection, function: Callable[..., Any]) -> None:
    # What went wrong is told by the root; a child whose root is gone has nobody to tell.
    with contextlib.suppress(JobFailed, ProcessLost, EOFError, BrokenPipeError, KeyboardInterrupt):
        function(_Child(rank, size, pipe), None)


def run_processes(num_processes: int, function: Callable[[World, Any], Any], argument: Any) -> Any:
    """`function(world, argument)` on this process, and `function(world, None)` on the others beside it.

    The others are spawned, not forked: the tokenizer's threads do not survive a fork.
    """
    if num_processes == 1:
        return function(World(), argument)
    context = multiprocessing.get_context("spawn")
    children, pipes = [], []
    for rank in range(1, num_processes):
        mine, its = context.Pipe()
        child = context.Process(target=_child_main, args=(rank, num_processes, its, function), daemon=True)
        child.start()
        its.close()
        children.append(child)
        pipes.append(mine)
    try:
        return function(_Root(list(children), pipes), argument)
    finally:
        for pipe in pipes:
            pipe.close()
        for child in children:
            child.join(5)
            if child.is_alive():
                child.kill()
                child.join()
