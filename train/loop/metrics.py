"""One stream of rows, several readers: metrics.jsonl, TensorBoard and other trackers, the progress bar or plain lines.

A row of losses is the mean since the row before, also where a kill came between (loss_accumulator.py); speeds and
times after a resume cover the steps since the resume.

Rank 0 opens `RunEvents`; the other ranks hold a `NoEvents`, so that the trainer never asks for its rank.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data_prep.shard_format.files import parse_json, read_file, write_text
from data_prep.shard_format.terminal import progress_bar
from train.errors import UserError, one_line
from train.evaluation.masking import LABEL
from train.loop.trackers import Start, Tracker, open_tracker

PLAIN_LINE_EVERY_S = 15.0
BAR = "{desc} |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
BAR_FIGURES = {
    "loss": "loss {:.4g}",
    "heldout_mlm_loss": "held-out {:.4g}",
    "heldout_relation": "relations {:.4g}",
    "heldout_embedding": "vectors {:.4g}",
    "tokens_per_s": "{:,.0f} tokens/s",
}
"""Few enough characters for 80 columns."""
Row = Mapping[str, float | str]
"""Figures by name, and words that say how they were taken, which metrics.jsonl alone holds."""
# What this module writes; other .jsonl files in the folder are the user's.
RECORDS = ("metrics", "spikes")


class NoEvents:
    """Takes everything, does nothing."""

    def row(self, step: int, values: Row, histograms: Mapping[str, torch.Tensor] = {}) -> None:
        """Ignore."""

    def record(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """Ignore."""

    def say(self, message: str) -> None:
        """Ignore."""

    def close(self) -> None:
        """Nothing is open."""


class RunEvents:
    """Writes the rows of steps after `resumed_step`; rows that a killed run had already written past that step
    are removed, so that each step stands in metrics.jsonl once. A start at step 0 writes that step's row anew.

    A disk that fills up, or a service that is gone, costs rows, said once, and not the run: whether that goes on, the
    checkpoints decide.

    Args:
        trackers: of run.trackers.
        config: the resolved configuration, for them.
    """

    def __init__(
        self,
        run_dir: Path,
        name: str,
        resumed_step: int,
        total_steps: int,
        trackers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] = {},
    ) -> None:
        self._run_dir = run_dir
        self._warned: set[str] = set()
        for record in RECORDS:
            _drop_rows_after(run_dir / f"{record}.jsonl", resumed_step)
        self._file = (run_dir / "metrics.jsonl").open("a", buffering=1)
        start = Start(run_dir, name, resumed_step, config)
        self._trackers: dict[str, Tracker] = {each: open_tracker(each, start) for each in trackers}
        self._progress = _Progress(name, resumed_step, total_steps)

    def row(self, step: int, values: Row, histograms: Mapping[str, torch.Tensor] = {}) -> None:
        """One row: numbers to all readers, words to metrics.jsonl, histograms (any shape) to TensorBoard alone."""
        with self._rows_may_be_lost():
            self._file.write(_json_line({"step": step, **values}))
        figures = {board_tag(key): value for key, value in values.items() if not isinstance(value, str)}
        named = {board_tag(key): tensor for key, tensor in histograms.items()}
        for name, tracker in self._trackers.items():
            with self._rows_may_be_lost(name):
                tracker.row(step, figures, named)
        self._progress.update(step, values)

    def record(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        """One JSON line in RUN/`name`.jsonl, for what is no figure."""
        assert name in RECORDS
        with self._rows_may_be_lost(), (self._run_dir / f"{name}.jsonl").open("a") as file:
            file.write(_json_line({"step": step, **values}))

    def say(self, message: str) -> None:
        """One line for the user, beside the progress bar."""
        self._progress.say(message)

    def close(self) -> None:
        """Flush and close every reader."""
        self._progress.close()
        with self._rows_may_be_lost():
            self._file.close()
        for name, tracker in self._trackers.items():
            with self._rows_may_be_lost(name):
                tracker.close()

    @contextmanager
    def _rows_may_be_lost(self, tracker: str = "tensorboard") -> Iterator[None]:
        """The folder may be full; the libraries of services raise errors of all kinds."""
        where, kind = f"run.trackers: {tracker}", Exception
        if tracker == "tensorboard":
            where, kind = str(self._run_dir), OSError
        try:
            yield
        except kind as error:
            if where not in self._warned:
                what = one_line(error)
                self.say(f"{where}: rows cannot be written ({what}); training goes on without them")
            self._warned.add(where)


Events = NoEvents | RunEvents
"""Where rows go."""

# The first word of a key is TensorBoard's group, where the key does not need to say it again.
NAMED_GROUPS = ("loss", "share", "heldout", "time", "startup")
GROUPS = {
    "teacher": "heldout",
    "top1": "loss",
    "loss_scale": "optimizer",
    "trust": "optimizer",
    "lr": "optimizer",
    "grad": "optimizer",
    "skipped": "optimizer",
    "tokens_per_s": "speed",
    "mfu": "speed",
    "memory_gib": "speed",
    "checkpoint_gib": "speed",
}


def board_tag(key: str) -> str:
    """TensorBoard's name of a key of metrics.jsonl: it groups by the part before the slash."""
    first, _, rest = key.partition("_")
    if first in NAMED_GROUPS and key not in GROUPS:
        return f"{first}/{rest or 'total'}"
    return f"{GROUPS.get(key) or GROUPS.get(first, 'progress')}/{key.replace('heldout_', '')}"


def _json_line(values: Mapping[str, Any]) -> str:
    """JSON has no NaN and no infinity: null stands for both."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, oldest first: a step, and numbers or None by name, and words under `LABEL`.

    A line that is no such row is left out: a kill may cut one short, a power cut fill one with zeros. Empty where the
    file is gone.
    """
    return [
        row
        for row in _read(run_dir / "metrics.jsonl")
        if all(
            value is None or isinstance(value, int | float) for name, value in row.items() if name != LABEL
        )
    ]


def _read(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in read_file(path).splitlines() if path.exists() else ():
        with contextlib.suppress(UserError):
            row = parse_json(line, str(path), "")
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
    return rows


def _drop_rows_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [row for row in _read(path) if step and row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def _short(value: float) -> str:
    """Four digits, or a whole number."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class _Progress:
    """A bar on a terminal; elsewhere a plain line every 15 s. Where nobody reads any more, training goes on."""

    def __init__(self, name: str, step: int, total_steps: int) -> None:
        self._name, self._first, self._total = name, step, total_steps
        self._start = time.monotonic()
        self._last_line = 0.0
        self._shown: dict[str, float] = {}
        self._bar = progress_bar(
            desc=name,
            initial=step,
            total=total_steps,
            bar_format=BAR,
            disable=not sys.stderr.isatty(),
        )

    def update(self, step: int, values: Row) -> None:
        news = {key: value for key in BAR_FIGURES if not isinstance(value := values.get(key, "absent"), str)}
        # A row holds some of them: the bar keeps the newest of each.
        self._shown |= news
        shown = {key: self._shown[key] for key in BAR_FIGURES if key in self._shown}
        if not self._bar.disable:
            figures = ", ".join(BAR_FIGURES[key].format(value) for key, value in shown.items())
            self._bar.set_postfix_str(figures, refresh=False)
            with contextlib.suppress(OSError):
                self._bar.update(step - self._bar.n)
        elif news and (time.monotonic() - self._last_line > PLAIN_LINE_EVERY_S or step == self._total):
            self._last_line = time.monotonic()
            figures = "  ".join(f"{key} {_short(value)}" for key, value in shown.items())
            self.say(f"{self._name}: step {step}/{self._total}  {figures}  {self._time_left(step)}")

    def _time_left(self, step: int) -> str:
        if step == self._first:
            return ""
        seconds = (time.monotonic() - self._start) / (step - self._first) * (self._total - step)
        return f"{tqdm.format_interval(seconds)} left"

    def say(self, message: str) -> None:
        with contextlib.suppress(OSError):
            tqdm.write(message, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._bar.close()
