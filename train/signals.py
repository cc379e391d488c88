"""SIGTERM, SIGINT and SIGUSR1 ask for a stop after the step in progress."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType, TracebackType

STOPPED_AFTER_SAVING = 75
# Launchers pass one Ctrl-C on more than once; only a later signal means impatience.
SAME_REQUEST_S = 2.0


class StopRequest:
    """While open, remembers that a signal came; a second one, 2 s later or more, exits at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self._first: float | None = None

    @property
    def requested(self) -> bool:
        return self._first is not None

    def ask(self) -> None:
        """Ask for a stop as a first signal does."""
        if self._first is None:
            self._first = time.monotonic()

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif now - self._first > SAME_REQUEST_S:
            sys.exit(128 + number)
