"""Which step's loss stands out, and which sequences it was computed on."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

# Below so many steps nothing is called usual yet.
LEAST_HISTORY = 20
HISTORY = 200
# The median absolute deviation of a normal distribution is its standard deviation divided by this.
NORMAL_MAD = 1.4826
# A curve without noise has no deviation: a spike is also so much above the median.
LEAST_RISE = 0.02


class Spike(NamedTuple):
    """A loss that stands out."""

    step: int
    loss: float
    median: float
    """Of the steps before; NaN where there is none."""
    deviation: float
    """Standard deviation of the steps before, estimated by their median absolute deviation."""


class SpikeDetector:
    """Compares each step's loss with the median of the 200 before it. The median and the median absolute deviation
    are not moved by the spikes themselves (Leys et al. 2013, doi:10.1016/j.jesp.2013.03.013). A loss that is no number
    is a spike without any history, the first of several in a row alone, and is no part of the history.

    Args:
        deviations: how many standard deviations above the median a spike is; 0 looks for none.
        history: of the start before, see `history`.
    """

    def __init__(self, deviations: float, history: Iterable[float] = ()) -> None:
        self._deviations = deviations
        self._history: deque[float] = deque(history, maxlen=HISTORY)
        self._was_finite = True

    @property
    def history(self) -> tuple[float, ...]:
        """The losses that the next one is compared with."""
        return tuple(self._history)

    def look(self, step: int, loss: float) -> Spike | None:
        """The spike, if this step is one; steps are given in order."""
        if not self._deviations:
            return None
        finite, was_finite = math.isfinite(loss), self._was_finite
        self._was_finite = finite
        median = deviation = math.nan
        if self._history and (finite or was_finite):
            median = statistics.median(self._history)
            deviation = NORMAL_MAD * statistics.median(abs(value - median) for value in self._history)
        if not finite:
            return Spike(step, loss, median, deviation) if was_finite else None
        enough = len(self._history) >= LEAST_HISTORY
        self._history.append(loss)
        rise = max(self._deviations * deviation, LEAST_RISE * abs(median))
        return Spike(step, loss, median, deviation) if enough and loss > median + rise else None
