"""What the time between the command and the first step is made of."""

from __future__ import annotations

import os
import time
from pathlib import Path

from train.checkpointing.state import TrainState
from train.loop.metrics import Events


class StartupTimer:
    """Adds up the seconds of named stages, from the start of the process on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic() - _seconds_of_this_process()

    def ended(self, stage: str) -> None:
        """A stage ends here, and the next begins."""
        now = time.monotonic()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now


def _seconds_of_this_process() -> float:
    """Since it was started, by the clock since boot, which nobody sets (proc_pid_stat(5), starttime)."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


class StartupReport:
    """After the first step: one line, and a row in metrics.jsonl."""

    def __init__(self, timer: StartupTimer, events: Events) -> None:
        self.timer, self.events = timer, events

    def after_step(self, state: TrainState) -> None:
        """Report once."""
        seconds = self.timer.seconds
        if "first_step" in seconds:
            return
        self.timer.ended("first_step")
        parts = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in seconds.items())
        self.events.say(f"start-up {sum(seconds.values()):.1f} s: {parts}")
        self.events.row(state.step, {f"startup_{name}": value for name, value in seconds.items()})
