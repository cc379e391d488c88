"""A bar over bytes, with documents/s and tokens/s, that sums up all processes of a job."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from pathlib import Path
from typing import Any

from data_prep.shard_format.files import write_text
from data_prep.shard_format.terminal import progress_bar

PUBLISH_S = 0.5


class Progress:
    """Counts of this process; on rank 0 also the bar over everybody's.

    The others leave their counts in small files beside the job's claims, which works alike for processes and
    for MPI ranks on other machines.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._file = folder / f"{name}-{uuid.uuid4().hex}.count"
        self._counts = {"done": 0, "documents": 0, "tokens": 0}
        self._published = 0.0
        self._started = time.monotonic()
        self._bar: Any = None
        self._earlier = 0

    def show_bar(self, total: int, unit: str) -> None:
        self._bar = progress_bar(total=total or None, desc=self._name, unit=unit, unit_scale=True)

    def already_done(self, amount: int) -> None:
        """What an earlier run has left: it moves the bar, but is not counted in its rates."""
        if self._bar is not None and amount:
            self._earlier += amount
            self._bar.initial = self._earlier
            self._bar.n += amount
            self._bar.refresh()

    def add(self, done: int = 0, documents: int = 0, tokens: int = 0) -> None:
        self._counts["done"] += done
        self._counts["documents"] += documents
        self._counts["tokens"] += tokens
        self.show()

    def show(self) -> None:
        """Publish or display, twice a second at most; cheap otherwise."""
        now = time.monotonic()
        if now - self._published >= PUBLISH_S:
            self._published = now
            self.publish()

    def publish(self) -> None:
        """Leave this process's counts for rank 0, or, on rank 0, move the bar."""
        if self._bar is None:
            with contextlib.suppress(OSError):  # of a disk that is full: the work itself will fail
                write_text(self._file, json.dumps(self._counts))
            return
        counts = dict(self._counts)
        for path in self._folder.glob(f"{self._name}-*.count"):
            with contextlib.suppress(OSError):
                for name, value in json.loads(path.read_text()).items():
                    counts[name] += value
        elapsed = max(time.monotonic() - self._started, 1e-9)
        rates = (
            f"{counts['documents'] / elapsed:,.0f} documents/s, {counts['tokens'] / elapsed:,.0f} tokens/s"
        )
        self._bar.set_postfix_str(rates, refresh=False)
        self._bar.update(max(0, self._earlier + counts["done"] - self._bar.n))

    def close(self, complete: bool) -> None:
        """End the bar, full where the work is `complete`: what holds no documents is passed over unseen."""
        self.publish()
        if complete and self._bar.total:
            self._bar.update(self._bar.total - self._bar.n)
        self._bar.close()
