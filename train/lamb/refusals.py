"""A rank that cannot step says so in the collective of the others, so that all of them end, with one message.

What is wrong with one rank's state or gradient is seen by that rank alone, before the sums of squares are added
over the ranks. It joins that all-reduce nonetheless, with a mark in a row of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class SharedRefusals:
    """Whether any rank of a group refused a step.

    On a CPU the ranks know at once. On a GPU reading the mark would wait for the device in every step: there the
    marked step changes no parameter on any rank, so that the engine's collectives go on, and all ranks raise
    when the next step, or a checkpoint, asks.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group = group
        self._later = device.type == "cuda"
        self._marks: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._own: Exception | None = None

    def settle(self, marks: torch.Tensor, own: Exception | None) -> None:
        """After the all-reduce; collective.

        Args:
            marks: 0-dimensional, how many ranks refused, on the device.
            own: why this rank did; None if it did not.
        Raises:
            ValueError, RuntimeError: see raise_together; on a GPU `check` raises it.
        """
        if not self._later:
            if marks.item() > 0:
                raise_together(own, self._group)
            return
        self._own = self._own or own
        if marks.is_cuda:
            self._marks = torch.empty((), dtype=marks.dtype, pin_memory=True)
            self._marks.copy_(marks, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._marks = marks.clone()

    def check(self) -> None:
        """Raise what the step before was refused for. The copy of its mark is long done by then: no wait."""
        if self._marks is None:
            return
        if self._copied is not None:
            self._copied.synchronize()
        if self._marks.item() > 0:
            raise_together(self._own, self._group)


def raise_together(own: Exception | None, group: Any) -> None:
    """Exchange the ranks' errors; collective. Where there is one, every rank raises.

    Raises:
        ValueError: the lowest refusing rank's message, with the ranks, the same on all; RuntimeError where the
            error is not a user's, and on that rank the error itself.
    """
    if not dist.is_initialized() or dist.get_world_size(group=group) == 1:
        if own is not None:
            raise own
        return
    mine = None if own is None else (dist.get_rank(), isinstance(own, ValueError), str(own))
    everybody: list[Any] = [None] * dist.get_world_size(group=group)
    dist.all_gather_object(everybody, mine, group=group)
    refused = [entry for entry in everybody if entry is not None]
    if not refused:
        return
    if own is not None and not isinstance(own, ValueError):
        raise own
    ranks = ", ".join(str(rank) for rank, _, _ in refused)
    message = f"on rank {ranks}: {refused[0][2]}"
    kind = ValueError if all(of_user for _, of_user, _ in refused) else RuntimeError
    raise kind(message) from own
