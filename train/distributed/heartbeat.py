"""A rank that dies or hangs ends the job within a stated time, with a line that names it.

Every rank's heartbeat thread writes a counter and where its main thread is into the job's TCP store once a second.
Rank 0 reads them: a rank whose counter stands still is lost (killed, frozen, cut off); if no main thread moves on, the
job hangs. The other ranks watch that the store, which rank 0 holds, answers. Without this, they would wait in a
collective for its timeout, and then each name only the operation that failed.

The first rank that fails reports: it counts itself in the store and prints if it was the first. The others read that
count and end silently. If rank 0 is lost, the store is gone, and each rank reports that.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from train.distributed.collective_errors import cause_of, is_from_a_collective
from train.distributed.store import HOST_KEY, of_this_attempt
from train.distributed.world import World
from train.errors import LostRankError, RendezvousError, ReportedElsewhereError

BEAT_S = 1.0
SECONDS_TO_SEE = 3 * BEAT_S
"""Within these every rank that lives has beaten, and has read the number of reports."""
SECONDS_TO_FAIL_TOO = 5.0
"""A rank may be about to meet the error that another one reports; it then ends with that error's exit code."""
REPORTS = "reports"
AGAIN = "run it again to go on from the newest checkpoint"


class Beat(NamedTuple):
    """What a rank writes once a second."""

    number: str
    host: str
    place: str


class Heartbeat:
    """A context manager around everything that the ranks do together.

    An error inside is raised as it is on the rank that reports it, and as ReportedElsewhereError on the others; that of
    a collective, as a LostRankError that names the ranks which are gone.

    Args:
        where: a short text that changes whenever the main thread moves on; called from another thread.
        lost_rank_timeout_s: a rank that does not beat for that long is lost.
        hang_timeout_s: ranks whose main threads all stay where they are for that long are stuck.
    """

    def __init__(
        self,
        world: World,
        where: Callable[[], str],
        *,
        lost_rank_timeout_s: float,
        hang_timeout_s: float,
    ) -> None:
        self._world, self._where = world, where
        self._lost_rank_timeout_s, self._hang_timeout_s = lost_rank_timeout_s, hang_timeout_s
        self._me = f"rank {world.rank} on {platform.node()}"
        self._ranks = [str(rank) for rank in range(world.world_size)]
        self._store: Any = None
        self._answered, self._ended = threading.Event(), threading.Event()
        self._reported = self._failed = False
        # After an error rank 0's thread keeps the process, and so the store, until the others have read it.
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=not world.is_first)

    def __enter__(self) -> Heartbeat:
        if self._world.world_size == 1:
            return self
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=self._lost_rank_timeout_s)
        try:
            # torch would try again for a while, and print C++ traces.
            socket.create_connection((address, port), timeout.total_seconds()).close()
            # A connection of its own: the main thread's may be held by a wait.
            store = of_this_attempt(
                dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
            )
            self._store = dist.PrefixStore("halfling-heartbeat", store)
            self._write(0)
            for rank in self._ranks if self._world.is_first else ():  # where it has written nothing yet
                beat = Beat("", store.get(HOST_KEY.format(rank)).decode(), "the start of the job")
                self._store.compare_set(rank, "", "\n".join(beat))
        except (OSError, dist.DistError) as error:
            raise RendezvousError(
                f"{self._me} lost rank 0 while the job started ({cause_of(error)}); run again"
            ) from None
        self._thread.start()
        if not self._world.is_first:
            threading.Thread(target=self._watch_rank_0, name="heartbeat-rank-0", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._store is None:
            return
        if not isinstance(error, Exception) or isinstance(error, ReportedElsewhereError):
            self._stop()
            return
        fault: Exception = error
        if is_from_a_collective(error):
            fault = LostRankError(self._explain(cause_of(error)))
        reports, self._failed = self._is_first_to_report(), True
        self._stop()
        if not reports:
            raise ReportedElsewhereError from fault
        if fault is not error:
            raise fault from error

    def _stop(self) -> None:
        self._ended.set()
        if not (self._failed and self._world.is_first):
            self._thread.join(timeout=2 * BEAT_S)

    def _run(self) -> None:
        watch, count = Watch(self._world.world_size), 0
        while not self._ended.wait(BEAT_S):
            count += 1
            try:
                self._write(count)
                # `set` only fills a socket's buffer: an answer alone shows that rank 0 can be reached.
                self._reported = self._store.add(REPORTS, 0) > 0
                if self._world.is_first:
                    watch.look(self._read())
            except Exception:  # whatever the store raises: rank 0, which holds it, is gone
                if not self._ended.wait(2 * BEAT_S):  # a job that is done ends a little earlier there
                    self._end(f"{self._me} has lost rank 0, which ended or cannot be reached")
                return
            self._answered.set()
            if self._reported:
                if not self._ended.wait(SECONDS_TO_FAIL_TOO):
                    os._exit(1)
                break
            if (fault := watch.fault(self._lost_rank_timeout_s, self._hang_timeout_s)) is not None:
                self._end(fault)
                break
        deadline = time.monotonic() + SECONDS_TO_SEE
        while self._failed and self._world.is_first and time.monotonic() < deadline:
            if self._store.add(REPORTS, 0) >= self._world.world_size:
                return
            time.sleep(BEAT_S / 10)

    def _watch_rank_0(self) -> None:
        """A host that is cut off sees no error: its packets are sent again for a quarter of an hour."""
        missed = 0
        while not self._ended.wait(BEAT_S) and not self._reported:
            missed = 0 if self._answered.is_set() else missed + 1
            self._answered.clear()
            if missed * BEAT_S > self._lost_rank_timeout_s:
                self._end(
                    f"{self._me} has had no answer from rank 0 for {missed * BEAT_S:.0f} s: that rank is frozen, or a "
                    "host is down or cut off",
                    rank_0_answers=False,
                )

    def _end(self, fault: str, rank_0_answers: bool = True) -> None:
        """End this process: its main thread is waiting in a collective that will not return."""
        reports = not rank_0_answers or self._is_first_to_report()
        if reports:
            with contextlib.suppress(OSError):  # nobody reads: then the job ends all the same
                print(f"error: {fault}. The job ends; {AGAIN}", file=sys.stderr, flush=True)
        # The report may be the main thread's, and rank 0's store is needed until the others have read it.
        if (self._world.is_first or not reports) and self._ended.wait(SECONDS_TO_SEE):
            return
        os._exit(1)

    def _is_first_to_report(self) -> bool:
        """True on each rank where rank 0, which holds the count, is gone without a report."""
        if self._reported:
            return False
        try:
            return bool(self._store.add(REPORTS, 1) == 1)
        except Exception:  # as in `_run`
            return True

    def _explain(self, error: str) -> str:
        """What a collective that failed with `error` means, from who still beats."""
        try:
            before = self._read()
            time.sleep(SECONDS_TO_SEE)
            after = self._read()
        except Exception:  # as in `_run`
            lost = "rank 0"
        else:
            silent = [rank for rank, beat in enumerate(after) if beat.number == before[rank].number]
            lost = ", ".join(
                f"rank {rank} on {after[rank].host}" for rank in silent if rank != self._world.rank
            )
        if not lost:
            return f"communication failed on {self._me}, although all ranks are alive ({error}); {AGAIN}"
        return f"{self._me} lost the connection to {lost}, which ended or was cut off ({error}); {AGAIN}"

    def _write(self, count: int) -> None:
        self._store.set(str(self._world.rank), "\n".join(Beat(str(count), platform.node(), self._where())))

    def _read(self) -> list[Beat]:
        return [Beat(*value.decode().split("\n")) for value in self._store.multi_get(self._ranks)]


class Watch:
    """What rank 0 knows of all ranks. It counts looks, one per BEAT_S, instead of reading a clock: a job that was
    suspended as a whole has missed none."""

    def __init__(self, world_size: int) -> None:
        self._beats: Sequence[Beat] = [Beat("", "", "")] * world_size
        self._silent, self._still = [0] * world_size, [0] * world_size

    def look(self, beats: Sequence[Beat]) -> None:
        """Take in every rank's newest beat."""
        for rank, (old, new) in enumerate(zip(self._beats, beats, strict=True)):
            self._silent[rank] = self._silent[rank] + 1 if new.number == old.number else 0
            self._still[rank] = self._still[rank] + 1 if new.place == old.place else 0
        self._beats = beats

    def fault(self, lost_rank_timeout_s: float, hang_timeout_s: float) -> str | None:
        """Which rank is lost, or where all are stuck; None where neither is the case."""
        for rank, looks in enumerate(self._silent):
            if looks * BEAT_S > lost_rank_timeout_s:
                return (
                    f"rank {rank} on {self._beats[rank].host} has not been heard of for {looks * BEAT_S:.0f} s, last "
                    f"in {self._beats[rank].place}: it was killed, is frozen or is cut off"
                )
        if all(looks * BEAT_S > hang_timeout_s for looks in self._still):
            places = ", ".join(f"rank {rank} in {beat.place}" for rank, beat in enumerate(self._beats))
            return f"no rank has moved on for {hang_timeout_s:.0f} s: {places}; the odd one out is the one to look at"
        return None
