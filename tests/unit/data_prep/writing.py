"""Shards written by the real command, and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import write_shards
from data_prep.shard_format.blocks import token_blocks
from data_prep.shard_format.manifest import Manifest


def make(*arguments: Any, processes: int = 1) -> int:
    return write_shards.main([*map(str, arguments), "--processes", str(processes)])


def documents_in(folder: Path, split: str = "train") -> list[tuple[int, ...]]:
    manifest = Manifest.load(folder)
    found = []
    for shard in manifest.splits[split]:
        for block in token_blocks((folder / shard.name).read_bytes()):
            ends = np.flatnonzero(block == manifest.tokenizer.sep_id)
            found += [tuple(part[:-1].tolist()) for part in np.split(block, ends + 1) if len(part)]
    return found


def last_line(capsys: pytest.CaptureFixture) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]
