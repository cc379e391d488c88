"""What Lamb takes: its numbers' ranges, and which options go together."""

from __future__ import annotations


def check_arguments(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clamp: tuple[float, float] | None,
) -> None:
    """ValueError where a number is out of range."""
    if not 0 <= lr < float("inf"):
        raise ValueError(f"lr is {lr}: it must be a finite number, 0 or more")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are {betas}: both must be at least 0 and below 1")
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps is {eps}: it must be a finite number above 0")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay is {weight_decay}: it must be a finite number, 0 or more")
    if clamp is not None and not 0 <= clamp[0] <= clamp[1]:
        raise ValueError(f"clamp is {clamp}: give (low, high) with 0 <= low <= high")


def check_mode(mode: str, *, prenormalize: bool, adapt_all: bool) -> None:
    """ValueError where the mode is unknown, or an option would have no effect in it."""
    if mode not in ("decoupled", "deepspeed"):
        raise ValueError(f"mode is {mode!r}: choose 'decoupled' or 'deepspeed'")
    if mode == "deepspeed" and prenormalize:
        raise ValueError(
            "prenormalize has no place in mode 'deepspeed', whose formula has none: drop one of them"
        )
    if mode == "deepspeed" and adapt_all:
        raise ValueError(
            "adapt_all would change nothing in mode 'deepspeed', which adapts all tensors: drop it"
        )
