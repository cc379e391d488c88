"""An executor of spawned processes that ends when one of them is killed, whatever it was doing.

concurrent.futures' own waits for ever where a process is killed as it starts: for a full pipe before Python 3.11.5
(gh-94777), for the other processes' ends after it. Here each process has a pipe of its own and a thread that
waits on nothing else.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any


class ProcessLost(Exception):
    """A process ended without an error of its own."""

    def __init__(self, exit_code: int | None) -> None:
        super().__init__(
            f"a worker process ended unexpectedly (exit code {exit_code}); "
            "run the same command again, with fewer --processes if memory was short"
        )


class ProcessExecutor(ThreadPoolExecutor):
    """`num_processes` spawned processes behind concurrent.futures' interface; they leave Ctrl-C to this one.

    What is submitted travels by pickle. A future raises ProcessLost where its process was killed, then or before, and
    OSError where none could be started.
    """

    def __init__(self, num_processes: int, initializer: Callable[[], object] | None = None) -> None:
        super().__init__(num_processes)
        self._process_initializer = initializer
        self._free: queue.SimpleQueue[tuple[Any, Connection]] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def _start_process(self) -> tuple[Any, Connection]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._process_initializer), daemon=True)
        with self._lock:
            # It travels through a pipe that nobody reads where the process is killed as it starts: a long one would
            # fill it.
            words, sys.argv = sys.argv, sys.argv[:1]
            try:
                process.start()
            finally:
                sys.argv = words
                theirs.close()  # so that ours ends with the process
        return process, ours

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return super().submit(self._call, fn, args, kwargs)

    def _call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            process, connection = self._free.get_nowait()
        except queue.Empty:  # as many as threads, and only when they are needed
            process, connection = self._start_process()
        try:
            connection.send((fn, args, kwargs))
            result, error, where = connection.recv()
        except (EOFError, OSError):
            with self._lock:
                process.join()
            raise ProcessLost(process.exitcode) from None
        finally:
            self._free.put((process, connection))
        if error is not None:
            raise error from RuntimeError(f"in a worker process:\n{where}")
        return result

    def __exit__(self, *error: object) -> None:
        self.shutdown(cancel_futures=True)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        while wait and not self._free.empty():
            process, connection = self._free.get()
            connection.close()
            process.join()


def _serve(connection: Connection, initializer: Callable[[], object] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if initializer is not None:
        initializer()
    with contextlib.suppress(EOFError, OSError):  # shut down, or the parent is gone
        while True:
            fn, args, kwargs = connection.recv()
            answer: tuple[Any, Exception | None, str]
            try:
                answer = (fn(*args, **kwargs), None, "")
            except Exception as error:
                answer = (None, error, traceback.format_exc())
            try:
                connection.send(answer)
            except OSError:
                raise
            except Exception as error:  # the answer does not pickle; nothing was sent
                connection.send((None, RuntimeError(f"{fn}: its answer does not pickle: {error}"), ""))
