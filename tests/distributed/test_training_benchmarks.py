"""launch/benchmark.py step and checkpoint on ranks, with models of no size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT


def figures_of(tmp_path: Path, *words: str) -> dict[str, Any]:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "launch/benchmark.py"), *words, "--json", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=300)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_steps_of_two_ranks_beside_the_original_formulation(tmp_path: Path) -> None:
    words = ["step", "--model", "2x32", "--shapes", "4x32", "--ranks", "2", "--rounds", "1"]
    (row,) = figures_of(tmp_path, *words, "--against", "plain", "--profile", str(tmp_path / "trace"))["steps"]
    assert set(row["runs"]) == {"ours", "plain"}
    assert row["ratio"] > 0
    for run in row["runs"].values():
        shares = run["shares"]
        assert sum(shares.values()) == pytest.approx(1)
        parts = ("data", "masking", "teacher", "forward", "backward", "collectives", "lamb", "metrics")
        assert all(shares[part] > 0 for part in parts)
        assert run["tokens_per_s"] == pytest.approx(2 * 4 * 32 / run["step_s"])
    assert 0 < row["share_of_floor"] <= 1
    assert (tmp_path / "trace" / "2-4x32-triple" / "operations.txt").exists()


def test_a_checkpoint_of_the_quickstarts_teacher(tmp_path: Path) -> None:
    words = ["checkpoint", "--model", "quickstart-teacher", "--dir", str(tmp_path)]
    (row,) = figures_of(tmp_path, *words)["checkpoints"]
    assert row["bytes"] > 12 * 1_800_000  # weights and two moments in fp32
    assert len(row["seconds"]) == 6
    assert all(seconds > 0 for seconds in row["seconds"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
