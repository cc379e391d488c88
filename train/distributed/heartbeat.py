"""A rank that dies or hangs takes the job down, with one message that names it.

Every rank's heartbeat thread writes a counter and where its main thread is into the job's TCP store once a
second. Rank 0 watches: a rank whose counter stands still is lost (killed, frozen, cut off); one whose main
thread stays in the same place while its heart beats is stuck. Without this, the others would wait in a
collective for its timeout, and then each name only the operation that failed.

Rank 0 tells, and the others leave it to it. Those that have lost rank 0 itself, on however many hosts, agree on who
tells by a file in the run folder. A rank that ends with an error of its own tells that (launch/error_messages.py), and
rank 0, which may be on its way to the same error, ends without a word some time later.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist

from train.distributed.store import WAIT_S
from train.errors import NotMetError

if TYPE_CHECKING:
    from train.distributed.world import World

BEAT_S = 1.0
LATE_LOOKS = 2
SECONDS_TO_NOTICE = 10.0
"""So long rank 0 may take to find out what the others have found out."""
SECONDS_TO_TELL = 5.0
"""So long it may take to tell and end; its launcher ends the others on its host at once, but not on other hosts."""
SECONDS_TO_CLAIM = 3.0
"""A file system may hang for ever where its server was on the host that died."""
ENDING = "ending"
HEARD = "heard"
FAILED = "failed"
SILENT_BEATS = 2.5
"""After so many beats without a change a rank is taken for dead, and not waited for."""
SECONDS_TO_FAIL_TOO = 15.0
"""So long after another rank's own error rank 0 may meet it too; the other tells it sooner."""


class Heartbeat:
    """A context manager around training.

    Args:
        where: a short text that changes whenever the main thread moves on; called from another thread.
        lost_rank_timeout_s: a rank whose heart does not beat for that long is lost.
        hang_timeout_s: ranks whose main threads all stay where they are for that long are stuck.
        folder: one that all ranks share, for who tells that rank 0 is lost; without it, each does.
    """

    def __init__(
        self,
        world: World,
        where: Callable[[], str],
        *,
        lost_rank_timeout_s: float,
        hang_timeout_s: float,
        folder: Path | None = None,
    ) -> None:
        self._world, self._where, self._folder = world, where, folder
        self._lost_rank_timeout_s, self._hang_timeout_s = lost_rank_timeout_s, hang_timeout_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._answered = time.monotonic()
        self._store: Any = None
        self._job = ""
        self._ending = threading.Lock()

    def __enter__(self) -> Heartbeat:
        if self._world.world_size > 1:
            try:
                self._join()
            except RuntimeError as error:  # torch's errors of stores and collectives
                raise NotMetError(
                    f"rank {self._world.rank} on {platform.node()} lost another rank while the job started "
                    f"({str(error).splitlines()[0]}); run again"
                ) from None
            self._answered = time.monotonic()
            self._thread.start()
            threading.Thread(target=self._watch_store, name="heartbeat-store", daemon=True).start()
        return self

    def _join(self) -> None:
        default: Any = dist.distributed_c10d._get_default_store()
        while hasattr(default, "underlying_store"):
            default = default.underlying_store
        patience, soon = default.timeout, timedelta(seconds=self._lost_rank_timeout_s)
        default.set_timeout(soon)  # all ranks were there: one that does not answer is gone
        try:
            # A connection of its own: the main thread's may be held by a wait.
            self._store = dist.PrefixStore("halfling-heartbeat", default.clone())
        finally:
            default.set_timeout(patience)
        self._store.set_timeout(soon)
        if self._world.is_first:
            self._store.set("job", uuid.uuid4().hex)
            for old in self._folder.glob(".lost-rank-0-*") if self._folder else ():
                old.unlink(missing_ok=True)
        self._store.set(f"{self._world.rank}", self._message("0"))
        self._wait_for_all()
        self._job = self._store.get("job").decode()

    def _wait_for_all(self) -> None:
        ranks = [str(rank) for rank in range(self._world.world_size)]
        try:
            self._store.wait(ranks, timedelta(seconds=WAIT_S))
        except dist.DistError:
            missing = ", ".join(rank for rank in ranks if not self._store.check([rank]))
            raise NotMetError(
                f"rank {missing} came, but did not follow within {WAIT_S:.0f} s while the job started: it was killed, "
                "is frozen or is cut off; run again"
            ) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_beating()
        if error is not None:
            self._announce(ENDING if self._world.is_first else FAILED)

    def lost_rank(self, error: str) -> str:
        """What rank 0 tells of a collective that failed with `error`. On other ranks this does not return.

        They end, and tell it themselves only where rank 0 does not.
        """
        lost = self.silent_ranks() or "another rank"
        if self._world.is_first and self._another_failed():
            self._end(None)
        fault = f"rank {self._world.rank} lost the connection to {lost}, which ended or was cut off ({error})"
        if not self._world.is_first:
            if lost.split(" on ")[0] != "rank 0":
                time.sleep(SECONDS_TO_NOTICE)  # the heart, which beats on, hears that rank 0 has told
            self._end(fault)
        with self._ending:  # unless the heart tells already
            return f"{fault}; run again to go on from the newest checkpoint"

    def _another_failed(self) -> bool:
        return any(count == FAILED for count, _, _ in self._hearts())

    def silent_ranks(self, wait_s: float = 3 * BEAT_S) -> str:
        """Who has died, for a message: the ranks whose hearts do not beat within `wait_s`; "" where all do."""
        try:
            before = self._hearts()
            time.sleep(wait_s)
            after = self._hearts()
        except Exception:  # the store went with the rank that holds it
            return "rank 0"
        still = [rank for rank, (count, _, _) in enumerate(after) if count == before[rank][0]]
        return ", ".join(f"rank {rank} on {after[rank][1]}" for rank in still if rank != self._world.rank)

    def _hearts(self) -> list[tuple[str, str, str]]:
        """(count, host, place) by rank."""
        if self._store is None:
            return []
        values = self._store.multi_get([str(rank) for rank in range(self._world.world_size)])
        return [tuple(value.decode().split("\n")) for value in values]

    def _message(self, count: str) -> str:
        return f"{count}\n{platform.node()}\n{self._where()}"

    def _beat(self) -> None:
        watch = _Watch(self._world.world_size)
        count = 0
        while not self._stopping.wait(BEAT_S):
            count += 1
            try:
                self._store.set(f"{self._world.rank}", self._message(str(count)))
                # `set` only fills a socket's buffer: an answer alone shows that rank 0 can be reached.
                ending = self._store.get("0").decode().startswith(ENDING)
                self._answered = time.monotonic()
                if ending:
                    self._store.set(f"{self._world.rank}", self._message(HEARD))
                    self._leave_it_to_rank_0()
                fault = self._look(watch) if self._world.is_first else None
            except Exception:  # whatever the store raises, it is that rank 0, which holds it, does not answer
                if self._stopping.wait(2 * BEAT_S):
                    return
                fault = f"rank {self._world.rank} has lost rank 0, which ended or cannot be reached"
            if fault is not None and not self._stopping.is_set():
                self._end(fault)

    def _watch_store(self) -> None:
        """A host that is cut off sees no error: its packets are sent again for a quarter of an hour."""
        late = 0
        while not self._stopping.wait(BEAT_S):
            silent_s = time.monotonic() - self._answered
            # More than one look: after a suspension of the whole job this thread may be the first to wake.
            late = late + 1 if silent_s > self._lost_rank_timeout_s else 0
            if late > LATE_LOOKS:
                self._end(
                    f"rank {self._world.rank} on {platform.node()} has had no answer from rank 0 for {silent_s:.0f} s: "
                    "that rank is frozen, or a host is down or cut off"
                )

    def _look(self, watch: _Watch) -> str | None:
        watch.look(self._hearts())
        if watch.failed(SECONDS_TO_FAIL_TOO) and not self._stopping.is_set():
            self._end(None)
        return watch.fault(self._lost_rank_timeout_s, self._hang_timeout_s)

    def _stop_beating(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * BEAT_S)

    def _announce(self, how: str) -> None:
        """Let the others hear how this rank ends; rank 0's store stays long enough for that."""
        try:
            if self._store is not None:
                self._store.set(f"{self._world.rank}", self._message(how))
                if self._world.is_first:
                    self._wait_until_heard()
        except Exception:  # then they find out by themselves
            return

    def _wait_until_heard(self) -> None:
        """The store ends with rank 0: wait for those that beat on to hear why, but for no dead rank."""
        begun, before = time.monotonic(), self._hearts()
        late_s = 0.0
        while late_s < SECONDS_TO_TELL:
            time.sleep(BEAT_S / 10)
            late_s = time.monotonic() - begun
            waited_for = [
                count
                for (count, _, _), (at_first, _, _) in zip(self._hearts()[1:], before[1:], strict=True)
                if count not in (HEARD, FAILED) and (count != at_first or late_s < SILENT_BEATS * BEAT_S)
            ]
            if not waited_for:
                return

    def _leave_it_to_rank_0(self) -> None:
        with self._ending:
            time.sleep(SECONDS_TO_TELL)
            os._exit(1)

    def _end(self, fault: str | None) -> NoReturn:
        """End this process at once: its main thread is waiting in a collective that will not return.

        Without a word where `fault` is None: another rank tells its own.
        """
        if self._world.is_first and threading.current_thread() is not self._thread:
            self._stop_beating()  # a beat would write over what is announced
        with self._ending:
            if fault is not None and (self._world.is_first or self._may_tell()):
                with contextlib.suppress(OSError):  # nobody reads: then the job ends all the same
                    print(
                        f"error: {fault}. The job ends; run it again to go on from the newest checkpoint",
                        file=sys.stderr,
                        flush=True,
                    )
            if self._world.is_first:
                self._announce(ENDING)
            os._exit(1)

    def _may_tell(self) -> bool:
        """False where another rank that has lost rank 0 tells so.

        Rank 0 itself makes no claim: where its host is cut off, nobody reads what it tells.
        """
        if self._folder is None:
            return True
        mine, path = [True], self._folder / f".lost-rank-0-{self._job}"

        def claim() -> None:
            try:
                path.open("x").close()
            except FileExistsError:
                mine[0] = False
            except OSError:  # twice told is better than not at all
                return

        thread = threading.Thread(target=claim, daemon=True)
        thread.start()
        thread.join(SECONDS_TO_CLAIM)
        return mine[0]


class _Watch:
    """What rank 0 knows of the others, on a clock that stands still while rank 0 does.

    After a suspension of the whole job rank 0 may be the first to wake; the others then have time to.
    """

    def __init__(self, world_size: int) -> None:
        self._looked, self._now = time.monotonic(), 0.0
        self._beats = [("", 0.0)] * world_size
        self._places = [("", 0.0)] * world_size
        self._hosts = [""] * world_size
        self._failed_at: float | None = None

    def look(self, hearts: Sequence[tuple[str, str, str]]) -> None:
        """Take in (count, host, place) of every rank."""
        since, self._looked = self._looked, time.monotonic()
        self._now += min(self._looked - since, 2 * BEAT_S)
        for rank, heart in enumerate(hearts):
            self._saw(rank, *heart)

    def _saw(self, rank: int, count: str, host: str, place: str) -> None:
        now = self._now
        if count == FAILED:
            self._failed_at = now if self._failed_at is None else self._failed_at
            count = f"{now}"  # it is not lost
        self._hosts[rank] = host
        if self._beats[rank][0] != count:
            self._beats[rank] = (count, now)
        if self._places[rank][0] != place:
            self._places[rank] = (place, now)

    def failed(self, since_s: float) -> bool:
        """Whether a rank ended with an error of its own so long ago."""
        return self._failed_at is not None and self._now - self._failed_at > since_s

    def fault(self, lost_rank_timeout_s: float, hang_timeout_s: float) -> str | None:
        now = self._now
        for rank, (_, seen) in enumerate(self._beats):
            if now - seen > lost_rank_timeout_s:
                return (
                    f"rank {rank} on {self._hosts[rank]} has not been heard of for {now - seen:.0f} s, last in "
                    f"{self._places[rank][0]}: it was killed, is frozen or is cut off"
                )
        if all(now - moved > hang_timeout_s for _, moved in self._places):
            places = ", ".join(f"rank {rank} in {place}" for rank, (place, _) in enumerate(self._places))
            return f"no rank has moved on for {hang_timeout_s:.0f} s: {places}; the odd one out is the one to look at"
        return None
