"""Which losses stand out."""

from __future__ import annotations

import math
import random
from dataclasses import asdict

import pytest

from train.checkpointing.state import TrainState
from train.loop.observers.loss_spikes import LEAST_HISTORY, SpikeDetector


def look_at(losses: list[float], deviations: float = 6.0) -> list[int]:
    detector = SpikeDetector(deviations)
    return [step for step, loss in enumerate(losses) if detector.look(step, loss) is not None]


def noisy(steps: int, slope: float = -0.002) -> list[float]:
    rng = random.Random(0)
    return [5 + slope * step + rng.gauss(0, 0.05) for step in range(steps)]


def test_a_spike_is_told_with_what_was_usual() -> None:
    detector = SpikeDetector(6.0)
    for step, loss in enumerate(noisy(100, slope=0.0)):
        assert detector.look(step, loss) is None
    spike = detector.look(100, 5.6)
    assert spike is not None
    assert (spike.step, spike.loss) == (100, 5.6)
    assert abs(spike.median - 5) < 0.02
    assert 0.04 < spike.deviation < 0.06


def test_noise_and_a_falling_curve_are_no_spikes() -> None:
    assert look_at(noisy(3000)) == []
    assert look_at([5 - 0.001 * step for step in range(1000)]) == []


def test_spikes_do_not_hide_later_ones() -> None:
    losses = noisy(400, slope=0.0)
    for step in (100, 101, 102, 200, 399):
        losses[step] += 1.0
    assert look_at(losses) == [100, 101, 102, 200, 399]


def test_nothing_is_usual_at_the_start_and_zero_looks_for_none() -> None:
    losses = [*noisy(LEAST_HISTORY - 1), 50.0]
    assert look_at(losses) == []
    assert look_at([*noisy(100), 50.0], deviations=0) == []
    assert look_at([*noisy(100), 50.0]) == [100]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_a_spike_once_and_spoils_nothing(loss: float) -> None:
    assert look_at([loss]) == [0]
    assert look_at([*noisy(150, slope=0.0), *[loss] * 150, *noisy(30, slope=0.0), 6.0]) == [150, 330]
    assert look_at([loss], deviations=0) == []


def test_a_resumed_run_goes_on_with_the_losses_before() -> None:
    losses = noisy(130, slope=0.0)
    losses[125] += 1.0
    first = SpikeDetector(6.0)
    for step, loss in enumerate(losses[:120]):
        assert first.look(step, loss) is None
    state = TrainState.from_dict(asdict(TrainState(120, loss_history=first.history)))
    second = SpikeDetector(6.0, state.loss_history)
    reported = [step for step in range(120, 130) if second.look(step, losses[step])]
    assert reported == [125]
    assert TrainState.from_dict({"step": 3}) == TrainState(3)  # saved before there was a history
