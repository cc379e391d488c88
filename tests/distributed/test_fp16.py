"""fp16 engines on real ranks: no CPU is said to have it, and a CPU computes it all the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.pretraining import finish, losses, start_without_launcher
from tests.distributed.workers_lamb import let_fp16_onto_the_cpu
from tests.paths import ROOT
from train.loop.metrics import read_rows


def test_a_run_under_loss_scaling_follows_the_fp32_run(
    settings: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """The scale is doubled after every eight steps without an overflow."""
    engine = json.loads((ROOT / "ds_configs/fp16.json").read_text())
    engine["fp16"] |= {"initial_scale_power": 16, "loss_scale_window": 8}
    (tmp_path / "engine.json").write_text(json.dumps(engine))
    words = [*settings, f"--deepspeed.config={tmp_path / 'engine.json'}", "--run.log_every_steps=4"]
    jobs = start_without_launcher(words, tmp_path / "run", [], [], before=let_fp16_onto_the_cpu)
    ends = [finish(job) for job in jobs]
    assert [code for code, _ in ends] == [0, 0], ends
    rows = [row for row in read_rows(tmp_path / "run") if "loss" in row]
    scales = [row["loss_scale"] for row in rows]
    print(scales, [row["skipped_steps"] for row in rows], losses(tmp_path / "run"), losses(undisturbed))
    assert losses(tmp_path / "run") == pytest.approx(losses(undisturbed), rel=5e-3)


@pytest.fixture(scope="module")
def norms() -> list[dict[str, Any]]:
    return run_ranks("tests.distributed.workers_lamb:accumulated_norms", 2)


def test_gradients_are_added_up_in_fp32(norms: list[dict[str, Any]]) -> None:
    """1 and eight times 2**-12, of which fp16 keeps the 1."""
    for rank in norms:
        assert rank["fp32"] == pytest.approx(math.sqrt(3) * (1 + 8 * 2**-12) / 9, rel=1e-6)
        assert rank["fp16"] == pytest.approx(math.sqrt(3) / 9, rel=1e-3 / 2)
