"""An error on one rank, raised on all: a rank that failed alone would leave the others in a collective for ever.

What is wrong with one rank's state or gradient is seen by that rank alone, before the sums of squares are added
over the ranks. It joins that all-reduce nonetheless, with a mark in a row of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class RankErrors:
    """Whether any rank of a group failed in a step.

    On a CPU the ranks know at once. On a GPU reading the mark would wait for the device in every step: there the
    marked step changes no parameter on any rank, so that the engine's collectives go on, and all ranks raise
    when the next step, or a checkpoint, asks.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group = group
        self._deferred = device.type == "cuda"
        self._failed: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._own: Exception | None = None

    def share(self, failed: torch.Tensor, own: Exception | None) -> None:
        """After the all-reduce; collective.

        Args:
            failed: 0-dimensional, how many ranks did, on the device.
            own: this rank's error, or None.
        Raises:
            ValueError, RuntimeError: see raise_on_all_ranks; on a GPU `raise_deferred` raises it.
        """
        if not self._deferred:
            if failed.item() > 0:
                raise_on_all_ranks(own, self._group)
            return
        self._own = self._own or own
        if failed.is_cuda:
            self._failed = torch.empty((), dtype=failed.dtype, pin_memory=True)
            self._failed.copy_(failed, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._failed = failed.clone()

    def raise_deferred(self) -> None:
        """Raise the errors of the step before. The copy of its mark is long done by then: no wait."""
        if self._failed is None:
            return
        if self._copied is not None:
            self._copied.synchronize()
        if self._failed.item() > 0:
            raise_on_all_ranks(self._own, self._group)


def raise_on_all_ranks(own: Exception | None, group: Any) -> None:
    """Exchange the ranks' errors; collective. Where there is one, every rank raises.

    Raises:
        ValueError: the lowest failing rank's message, with the ranks, the same on all; RuntimeError where an error
            is no ValueError, and on that rank the error itself.
    """
    if not dist.is_initialized() or dist.get_world_size(group=group) == 1:
        if own is not None:
            raise own
        return
    mine = None if own is None else (dist.get_rank(), isinstance(own, ValueError), str(own))
    everybody: list[Any] = [None] * dist.get_world_size(group=group)
    dist.all_gather_object(everybody, mine, group=group)
    failed = [entry for entry in everybody if entry is not None]
    if not failed:
        return
    if own is not None and not isinstance(own, ValueError):
        raise own
    ranks = ", ".join(str(rank) for rank, _, _ in failed)
    message = f"on rank {ranks}: {failed[0][2]}"
    kind = ValueError if all(is_value_error for _, is_value_error, _ in failed) else RuntimeError
    raise kind(message) from own


def true_on_all_ranks(here: bool, device: torch.device, group: Any) -> bool:
    """Whether `here` is true on every rank of `group`: one 4-byte all-reduce."""
    if not dist.is_initialized() or dist.get_world_size(group=group) == 1:
        return here
    least = torch.tensor(int(here), dtype=torch.int32, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    return bool(least)
