"""What a run remembers between two starts, beside the engine's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LossWindow:
    """Losses added up since the last logged row, on all ranks."""

    sums: Mapping[str, list[float]] = field(default_factory=dict)
    """Name of a loss term -> its sum over micro batches, one per rank (fp32 values)."""

    micro_batches: float = 0.0
    """Micro batches in each of these sums; a fraction where another number of ranks shared them out."""

    micro_batches_per_step: int = 0
    """Over all ranks; 0 in older checkpoints, which do not say."""


@dataclass(frozen=True)
class TrainState:
    """Order, masks, learning rate and dropout are functions of the step."""

    step: int = 0
    """Optimizer steps done."""

    losses: LossWindow = field(default_factory=LossWindow)
    """Filled in when the state is saved."""

    loss_history: tuple[float, ...] = ()
    """Losses of the steps before, for train/loop/observers/loss_spikes.py; filled in when the state is saved."""

    left_out: tuple[int, ...] = ()
    """Steps, counted from 0, whose batches are not used (train/loop/divergence.py)."""

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> TrainState:
        """The inverse of dataclasses.asdict; KeyError, TypeError or ValueError where it is something else."""
        if type(saved["step"]) is not int or saved["step"] < 0:
            raise ValueError(f"step is {saved['step']!r}")
        return cls(
            saved["step"],
            LossWindow(**saved.get("losses", {})),
            tuple(saved.get("loss_history", ())),
            tuple(saved.get("left_out", ())),
        )
