"""Mean losses between two logged rows, summed on the device and kept in checkpoints.

A row that a kill falls into is the same as an undisturbed run's: the sums so far are part of the state.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from train.checkpointing.state import LossWindow


class LossSums:
    """Adds up loss terms on the device; nothing is waited for until they are asked for.

    Args:
        micro_batches_per_step: over all ranks.
    """

    def __init__(self, micro_batches_per_step: int) -> None:
        self._per_step = micro_batches_per_step
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0.0
        self._by_step: dict[int, list[torch.Tensor]] = {}
        self._finite: torch.Tensor | None = None

    def add(self, step: int, terms: Mapping[str, torch.Tensor]) -> None:
        """Count one micro batch of a step; `terms` by name, "loss" among them."""
        for name, value in terms.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.float()
        self._count += 1
        loss = terms["loss"].detach()
        self._by_step.setdefault(step, []).append(loss)
        finite = torch.isfinite(loss)
        self._finite = finite if self._finite is None else self._finite & finite

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added since the last call of `take`."""
        return not self._sums

    def take(self) -> tuple[list[str], list[int], torch.Tensor]:
        """The means since the last call, in one tensor on the device, so that ranks add up once.

        Returns:
            Names of the terms; the steps that were added; (terms + steps,) fp32: each term's mean over the micro
            batches, then the loss of each step.
        """
        terms, steps = list(self._sums), list(self._by_step)
        means = [total / self._count for total in self._sums.values()]
        means += [torch.stack(losses).mean() for losses in self._by_step.values()]
        self._sums, self._count, self._by_step = {}, 0.0, {}
        return terms, steps, torch.stack(means)

    def were_finite(self) -> bool:
        """Whether every loss since the last call was a number; waits for the device."""
        finite, self._finite = self._finite, None
        return finite is None or bool(finite)

    def window(self) -> LossWindow:
        """The sums of all ranks; every rank calls this, with as many micro batches added."""
        if not self._sums:
            return LossWindow()
        own = torch.stack(list(self._sums.values()))
        ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, own)
        by_term = torch.stack(ranks, dim=1).tolist()
        return LossWindow(dict(zip(self._sums, by_term, strict=True)), self._count, self._per_step)

    def restore(self, window: LossWindow, device: str) -> None:
        """Go on from a checkpoint's sums.

        The same number of ranks each takes its own, bit for bit; for another number the total, and the
        micro batches in it, are shared out equally. Where a step has another number of micro batches now, both are
        scaled, so that every step of the row weighs the same.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        scale = self._per_step / (window.micro_batches_per_step or self._per_step)
        for name, sums in window.sums.items():
            own = sums[rank] if len(sums) == world_size else sum(sums) / world_size
            self._sums[name] = torch.tensor(own * scale, dtype=torch.float32, device=device)
            self._count = window.micro_batches * len(sums) / world_size * scale
