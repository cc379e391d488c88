"""Where a step's time goes, without waiting for the device between logging steps."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Clock:
    """Adds up the seconds spent in named sections.

    On a GPU a section is a pair of CUDA events, which are read, and so waited for, in `read` alone; on a CPU
    it is the wall clock.
    """

    def __init__(self, device: str) -> None:
        self._on_gpu = device.startswith("cuda")
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self.entered = 0
        """Sections entered so far."""
        self.current = "start-up"
        """Name of the section entered last."""
        self._parts = 0
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count what runs inside towards `name`."""
        self._enter(name)
        if self._on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            with self.host_section(name):
                yield

    @contextmanager
    def host_section(self, name: str) -> Iterator[None]:
        """Count the host's wall clock while what is inside runs towards `name`."""
        self._enter(name)
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start_s

    def waiting_for(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, with the host's time spent waiting for each counted towards `name`."""
        iterator = iter(items)
        while True:
            try:
                with self.host_section(name):
                    item = next(iterator)
            except StopIteration:
                return
            yield item

    def read(self) -> dict[str, float]:
        """Seconds by section since the last call."""
        if self._events:
            torch.cuda.synchronize()
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1000
        seconds, self._seconds, self._events = self._seconds, defaultdict(float), []
        return dict(seconds)

    def part_done(self) -> None:
        """Note that a part of the section is done: one that lasts longer than run.hang_timeout_s is no hang."""
        self._parts += 1

    def where(self) -> str:
        """Changes with every section and part: shows a watcher that the main thread moves on, and where it is."""
        return f"{self.current} (section {self.entered}{f'.{self._parts}' if self._parts else ''})"

    def _enter(self, name: str) -> None:
        self.entered += 1
        self.current, self._parts = name, 0
