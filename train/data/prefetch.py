"""Reading ahead with threads that end when their consumer does, and whose errors are the consumer's."""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from queue import Full, Queue, SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")
Key = TypeVar("Key")

# How often a waiting thread looks whether its consumer is still there.
_POLL_S = 0.1
# How long the end of an iterator, or of the process, waits for a thread: a download may hang for ever.
_JOIN_S = 5.0

_producers: dict[threading.Thread, threading.Event] = {}


@atexit.register
def _stop_producers() -> None:
    """A daemon thread that is still in torch or numpy when the interpreter goes aborts the process."""
    producers = dict(_producers)
    for left in producers.values():
        left.set()
    for thread in producers:
        thread.join(_JOIN_S)


class ConsumerLeft(Exception):
    """Raised in a producer, to end it, when nobody takes its items any more."""


def in_background(produce: Callable[[threading.Event], Iterator[Item]], depth: int) -> Iterator[Item]:
    """What `produce` yields, made by a thread that runs at most `depth` items ahead.

    `produce` is given an event that is set when the consumer has left. The thread starts with the first
    item asked for, and ends when the iterator is exhausted, closed or dropped. An error of `produce` is
    raised here, after the items that came before it.
    """
    left = threading.Event()
    queue: Queue[Item | BaseException | None] = Queue(depth)

    def put(item: Item | BaseException | None) -> None:
        while not left.is_set():
            with contextlib.suppress(Full):
                return queue.put(item, timeout=_POLL_S)
        raise ConsumerLeft

    def run() -> None:
        with contextlib.suppress(ConsumerLeft):
            try:
                for item in produce(left):
                    put(item)
                put(None)
            except ConsumerLeft:
                raise
            except BaseException as error:
                put(error)
        _producers.pop(thread)

    # A daemon, as are the readers: a hanging download must not keep a finished run from exiting.
    thread = threading.Thread(target=run, name="batches", daemon=True)
    _producers[thread] = left
    thread.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        left.set()
        thread.join(_JOIN_S)


class ReadAhead(Generic[Key, Item]):
    """Items by key, made by daemon threads in the order of the first requests, freed after their last use.

    Uses are counted in steps, which never decrease: request(key, step) says that `step` needs the item, and
    forget(step) that all steps up to it are over. One thread calls all methods.
    """

    def __init__(self, make: Callable[[Key], Item], num_threads: int) -> None:
        self._make = make
        self._jobs: SimpleQueue[tuple[Key, Future[Item]] | None] = SimpleQueue()
        self._items: dict[Key, Future[Item]] = {}
        self._last_step: dict[Key, int] = {}
        self._threads = [
            threading.Thread(target=self._work, name="batches: reader", daemon=True)
            for _ in range(num_threads)
        ]

    def __enter__(self) -> ReadAhead[Key, Item]:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        for future in self._items.values():
            future.cancel()
        self._items.clear()
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + 0.8 * _JOIN_S  # done before those who wait for this thread give up
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def __len__(self) -> int:
        return len(self._items)

    def request(self, key: Key, step: int) -> None:
        self._last_step[key] = step
        if key not in self._items:
            self._items[key] = Future()
            self._jobs.put((key, self._items[key]))

    def get(self, key: Key, left: threading.Event) -> Item:
        """A requested item, waited for; its error is raised here, and ConsumerLeft once `left` is set."""
        future = self._items[key]
        while not left.is_set():
            if future.done() or wait([future], timeout=_POLL_S).done:
                return future.result()
        raise ConsumerLeft

    def forget(self, step: int) -> None:
        for key in [key for key, last in self._last_step.items() if last <= step]:
            del self._last_step[key], self._items[key]

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            key, future = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._make(key))
                except BaseException as error:
                    future.set_exception(error)
            del job, future  # or the item would live until the next job comes
