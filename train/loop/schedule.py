"""The learning rate as a pure function of the step."""

from __future__ import annotations


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, total_steps: int, decay_power: float
) -> float:
    """Linear warm-up to `peak`, then polynomial decay that would reach 0 one step after the last.

    Args:
        step: 0-based optimizer step.
        peak: learning rate at the end of the warm-up.
        warmup_steps: steps of warm-up; the first of them already trains, at peak / warmup_steps.
        total_steps: steps of the run.
        decay_power: exponent of the decay; 1 is linear, 0 keeps the peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    left = (total_steps - step) / max(1, total_steps - warmup_steps)
    return peak * max(0.0, left) ** decay_power
