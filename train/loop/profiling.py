"""A torch profiler trace of a few steps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from train.checkpointing.state import TrainState
from train.loop.metrics import Events

# The first steps allocate and warm up: they are not what a step costs.
SKIPPED_STEPS = 3


class Profiling:
    """Traces `steps` steps after the first three of this start: RUN/profile/trace-rank-R.json (for
    https://ui.perfetto.dev or chrome://tracing) and, on rank 0, a table of the costliest operations.

    A trace that cannot be written (full disk) costs a message, not the run.
    """

    def __init__(self, folder: Path, rank: int, steps: int, events: Events) -> None:
        self.folder, self.rank, self.steps, self.events = folder, rank, steps, events
        self._done = 0
        self._profile: profile | None = None

    def after_step(self, state: TrainState) -> None:
        """Start or end the trace, if this is the step for it."""
        self._done += 1
        if self._done == SKIPPED_STEPS:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces itself on every rank
            # torch 2.11 warns otherwise that a next cycle, of which there is none, would clear the events.
            self._profile = profile(activities=activities, acc_events=True)
            self._profile.start()
        elif self._done == SKIPPED_STEPS + self.steps:
            self.finish()

    def finish(self) -> None:
        """Write what has been traced, if the trace is still open."""
        traced, self._profile = self._profile, None
        if traced is not None:
            traced.stop()
        if self._done <= SKIPPED_STEPS:
            self.events.say(
                f"profile: nothing was traced: this start made {self._done} steps, and the first {SKIPPED_STEPS} are "
                "left out"
            )
        elif traced is not None:
            try:
                self._write(traced)
            except (OSError, RuntimeError) as error:
                self.events.say(f"profile: the trace could not be written to {self.folder}: {error}")

    def _write(self, traced: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"trace-rank-{self.rank}.json"
        traced.export_chrome_trace(str(trace))
        if self.rank == 0:
            key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = self.folder / "operations.txt"
            table.write_text(traced.key_averages().table(sort_by=key, row_limit=40))
            self.events.say(
                f"profile: {trace} (open it at https://ui.perfetto.dev), costliest operations: {table}"
            )


@contextmanager
def profiling(folder: Path, rank: int, steps: int, events: Events) -> Iterator[list[Profiling]]:
    """The observer that traces `steps` steps, in a list; an empty one for 0 steps."""
    observers = [Profiling(folder, rank, steps, events)] if steps else []
    try:
        yield observers
    finally:
        for observer in observers:
            observer.finish()
