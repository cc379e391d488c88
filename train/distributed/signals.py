"""SIGTERM, SIGINT and SIGUSR1 ask for a stop after the step in progress; what they do to a process's children."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

STOPPED_AFTER_SAVING = 75
# Launchers pass one Ctrl-C on more than once; only a later signal means impatience.
SAME_REQUEST_S = 2.0


class StopRequest:
    """While open, remembers that a signal came; a second one, 2 s later or more, exits at once.

    A thread listens: Python's own handlers run in the main thread between two bytecodes, which never comes while it
    waits in a collective for a rank that hangs.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self._first: float | None = None
        self._acts: list[Callable[[], None]] = []

    @property
    def requested(self) -> bool:
        return self._first is not None

    def ask(self) -> None:
        """Ask for a stop as a first signal does."""
        if self._first is None:
            self._first = time.monotonic()
            for act in self._acts:
                act()

    def when_asked(self, act: Callable[[], None]) -> None:
        """Have `act` called, from another thread, as soon as a stop is asked for."""
        self._acts.append(act)
        if self.requested:
            act()

    def __enter__(self) -> StopRequest:
        self._listened, self._woken, self._woken_before = _wakeup_pipe()
        self._before = {number: signal.signal(number, _leave_to_the_thread) for number in self.SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._woken_before)
        os.close(self._woken)
        self._thread.join()
        os.close(self._listened)

    def _listen(self) -> None:
        for number in _received(self._listened):
            if number in self.SIGNALS:
                self._receive(number)

    def _receive(self, number: int) -> None:
        if self._first is None:
            self.ask()
        elif time.monotonic() - self._first > SAME_REQUEST_S:
            os._exit(128 + number)


def restart_on_sigusr1() -> None:
    """Have SIGUSR1 end this process with 75 until a StopRequest is open: there is nothing to save yet, and a job script
    starts again what ends with 75. Not SIGTERM: a launcher sends that to the others where one rank cannot start.

    A thread listens here too: the main thread may wait for other ranks, in torch's C++.
    """
    listened, _, _ = _wakeup_pipe()
    signal.signal(signal.SIGUSR1, _leave_to_the_thread)

    def listen() -> None:
        if signal.SIGUSR1 in _received(listened):
            os._exit(STOPPED_AFTER_SAVING)

    threading.Thread(target=listen, name="early-signals", daemon=True).start()


def _wakeup_pipe() -> tuple[int, int, int]:
    """Where the numbers of caught signals are read, where they are written from now on, and where until now."""
    listened, woken = os.pipe()
    os.set_blocking(woken, False)
    return listened, woken, signal.set_wakeup_fd(woken, warn_on_full_buffer=False)


def _received(listened: int) -> Iterator[int]:
    """The numbers of signals as they come, until the other end of the pipe is closed."""
    while number := os.read(listened, 1):
        yield number[0]


def _leave_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Nothing: without a handler the signal would end the process."""


@contextlib.contextmanager
def stop_signals_blocked_in_children() -> Iterator[None]:
    """Processes started inside have these signals blocked, which Ctrl-C and Slurm send to a rank's children too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Have Linux send this process a signal when its parent dies, also by kill -9, so that it does not go on unseen
    beside the next call's."""
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
