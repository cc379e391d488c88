"""The time that collectives take, DeepSpeed's among them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from train.loop.timing import Clock

COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all_single",
)


@contextmanager
def timed_collectives(clock: Clock) -> Iterator[None]:
    """While open, every collective of torch.distributed counts towards the clock's section "communication".

    DeepSpeed's own comms_logger would wait for the device after every one. What an asynchronous collective does
    after it was started is not seen. The time is a part of the sections around it (backward pass, optimizer step).
    """

    def timed(collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def call(*args: Any, **kwargs: Any) -> Any:
            with clock.section("communication"):
                return collective(*args, **kwargs)

        return call

    from deepspeed.comm import comm

    # DeepSpeed's backend keeps two of them from the time when it was made.
    backend = comm.cdb
    places = [(dist, name) for name in COLLECTIVES]
    places += [(backend, "all_gather_function"), (backend, "reduce_scatter_function")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name, collective in originals:
        setattr(owner, name, timed(collective))
    try:
        yield
    finally:
        for owner, name, collective in originals:
            setattr(owner, name, collective)
