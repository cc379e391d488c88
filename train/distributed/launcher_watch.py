"""Ranks whose launcher is gone stop after saving, instead of training on unseen.

DeepSpeed's launcher is two processes: the `deepspeed` command and, below it, the parent of the ranks. When the
first is killed, the second goes on alone. The ranks get no signal, so each looks once a second.
"""

from __future__ import annotations

import os
import threading

import psutil

from train.distributed.signals import StopRequest

LOOK_S = 1.0


class LauncherWatch:
    """While open, asks for a stop when DeepSpeed's launcher has ended. Other parents are not watched: a shell
    may well end before a job that it put into the background.

    Args:
        chain: what `launcher_chain` said when this process began.
    """

    def __init__(self, stop: StopRequest, chain: tuple[int, int] | None) -> None:
        self._stop, self._chain = stop, chain
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._look, name="launcher-watch", daemon=True)

    def __enter__(self) -> LauncherWatch:
        if self._chain is not None:
            self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        while not self._closing.wait(LOOK_S):
            if launcher_chain() != self._chain:
                self._stop.ask()
                return


def launcher_chain() -> tuple[int, int] | None:
    """Process ids of the ranks' parent and of its parent, if that is DeepSpeed's launcher."""
    parent = os.getppid()
    try:
        process = psutil.Process(parent)
        if not any("deepspeed.launcher" in word for word in process.cmdline()):
            return None
        return parent, process.ppid()
    except psutil.Error:
        return None
