"""Where a step's time goes, finer than the trainer's own clock tells."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from train.loop.timing import Clock
from train.loop.trainer import Trainer

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce",
    "reduce_scatter_tensor",
    "broadcast",
)


class NestedClock(Clock):
    """The trainer's clock, whose sections may lie in one another: each counts its own time alone.

    `totals` holds the seconds by name since `begin`; `read` hands on what the trainer's log expects.
    """

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.totals: dict[str, float] = {}
        self._path: list[str] = []

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count what runs inside towards `name`, but for sections within."""
        if not self._on_gpu:
            with self.host_section(name):
                yield
        else:
            with self._inside(name) as path, super().section(path):
                yield

    @contextmanager
    def host_section(self, name: str) -> Iterator[None]:
        """The same by the host's clock."""
        with self._inside(name) as path, super().host_section(path):
            yield

    @contextmanager
    def _inside(self, name: str) -> Iterator[str]:
        self._path.append(name)
        try:
            yield "/".join(self._path)
        finally:
            self._path.pop()

    def begin(self) -> None:
        """Forget what has been counted."""
        super().read()
        self.totals = {}

    def read(self) -> dict[str, float]:
        """Seconds by the outermost sections' names since the last call."""
        outer: dict[str, float] = {}
        for path, seconds in super().read().items():
            above, _, name = path.rpartition("/")
            self.totals[name] = self.totals.get(name, 0.0) + seconds
            if above:
                enclosing = above.rpartition("/")[2]
                self.totals[enclosing] = self.totals.get(enclosing, 0.0) - seconds
            else:
                outer[name] = seconds
        return outer

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, counted towards `name`."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.section(name):
                return function(*args, **kwargs)

        return run


def divide(trainer: Trainer, clock: NestedClock) -> None:
    """Count the parts of what the trainer's sections hold: masking, forward, backward, the optimizer's own step."""
    engine = trainer.engine
    optimizer, data = engine.optimizer.optimizer, trainer.data
    places: list[tuple[Any, str, str]] = [
        (data, "mask", "masking"),
        (engine.module, "forward", "forward"),
        (engine, "backward", "backward"),
        (optimizer, "step", "lamb"),
    ]
    for owner, attribute, name in places:
        setattr(owner, attribute, clock.timed(name, getattr(owner, attribute)))


@contextmanager
def collectives_counted(clock: NestedClock) -> Iterator[None]:
    """Count what waits for other ranks towards `collectives`: on a CPU, where backward runs on the calling thread."""
    before = {name: getattr(dist, name) for name in COLLECTIVES}
    for name, function in before.items():
        setattr(dist, name, clock.timed("collectives", function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(dist, name, function)
