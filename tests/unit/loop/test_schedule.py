"""Learning rate: hand-worked values."""

from __future__ import annotations

import pytest

from train.loop.schedule import learning_rate


@pytest.mark.parametrize(
    ("step", "power", "expected"),
    [(0, 1, 0.25), (3, 1, 1.0), (4, 1, 1.0), (8, 1, 0.5), (11, 1, 0.125), (8, 0.5, 0.5**0.5), (11, 0, 1.0)],
)
def test_warmup_of_4_then_decay_over_8(step: int, power: float, expected: float) -> None:
    got = learning_rate(step, peak=1.0, warmup_steps=4, total_steps=12, decay_power=power)
    assert got == pytest.approx(expected)


def test_peak_scales() -> None:
    assert learning_rate(0, peak=3.0, warmup_steps=0, total_steps=10, decay_power=1.0) == 3.0


def test_all_steps_may_be_warmup() -> None:
    rates = [learning_rate(s, peak=1.0, warmup_steps=2, total_steps=2, decay_power=1.0) for s in range(2)]
    assert rates == [0.5, 1.0]
