"""Ranks of this machine by the real launcher, for one measurement."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.shard_format.files import write_json
from launch.common.stages import deepspeed_words
from train.distributed.signals import end_with_parent
from train.errors import RunError

SCRIPT = Path(__file__).with_name("ranks.py")


def measured(
    spec_in: Callable[[Path], dict[str, Any]], ranks: int, beside: Path | None = None
) -> dict[str, Any]:
    """The figures of one start of `ranks` ranks.

    Args:
        spec_in: what to measure (see ranks.py), with inputs in the folder that it is given.
        beside: where that folder is made, and removed afterwards; None for the system's place.
    Raises:
        RunError: it failed, with the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=beside) as name:
        folder = Path(name)
        file, log = folder / "spec.json", folder / "log"
        write_json(file, {**spec_in(folder), "folder": name})
        with log.open("w") as output:
            done = subprocess.run(
                [*deepspeed_words(ranks), str(SCRIPT), str(file)],
                env=os.environ,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=end_with_parent,
                check=False,
            )
        found = Path(f"{file}.out")
        if done.returncode or not found.exists():
            raise RunError(f"measuring failed (exit code {done.returncode}): {log.read_text()[-2000:]}")
        figures: dict[str, Any] = json.loads(found.read_text())
        return figures
