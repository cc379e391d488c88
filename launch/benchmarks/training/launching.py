"""Ranks of this machine by the real launcher, for one measurement."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.shard_format.files import write_json
from launch.stages import deepspeed_words, end_with_parent
from train.errors import RunError

SCRIPT = Path(__file__).with_name("ranks.py")


def measured(spec: Mapping[str, Any], ranks: int, folder: Path) -> dict[str, Any]:
    """The figures of one start of `ranks` ranks.

    Args:
        spec: see ranks.py.
        folder: for its inputs, its log and what it writes.
    Raises:
        RunError: it failed, with the end of its log.
    """
    file, log = folder / "spec.json", folder / "log"
    write_json(file, {**spec, "folder": str(folder)})
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
