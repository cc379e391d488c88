"""What the time between the command and the first step is made of."""

from __future__ import annotations

import time

import psutil

from train.checkpointing.checkpoint import TrainState
from train.loop.metrics import Events


class StartUp:
    """Adds up the seconds of named stages, from the start of the process on."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = psutil.Process().create_time()

    def ended(self, stage: str) -> None:
        """A stage ends here, and the next begins."""
        now = time.time()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._since
        self._since = now

    def report(self) -> dict[str, float]:
        """Seconds by stage."""
        return dict(self._seconds)


class StartUpReport:
    """Says after the first step what the start took, and leaves the figures in metrics.jsonl."""

    def __init__(self, start_up: StartUp, events: Events) -> None:
        self.start_up, self.events = start_up, events
        self._told = False

    def after_step(self, state: TrainState) -> None:
        """Report once."""
        if self._told:
            return
        self._told = True
        self.start_up.ended("first_step")
        seconds = self.start_up.report()
        parts = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in seconds.items())
        self.events.say(f"start-up {sum(seconds.values()):.1f} s: {parts}")
        self.events.row(state.step, {f"startup_{name}": value for name, value in seconds.items()})
