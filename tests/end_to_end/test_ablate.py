"""launch/ablate.py for real on small shards: killed after the first variant, gone on with, compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launch import ablate
from launch.ablation.runs import scorer
from launch.ablation.table import METRICS
from launch.common.cli import parse_config
from tests.distributed.pretraining import finish, small_settings, wait_for
from tests.paths import ROOT
from train.loop.metrics import read_rows


@pytest.fixture(scope="module")
def settings(shards_folder: str, teacher_folder: str) -> list[str]:
    return [*small_settings(shards_folder, teacher_folder), "--evaluation.every_steps=24"]


def start(settings: list[str], out: Path) -> subprocess.Popen[str]:
    options = ["--out", str(out), "--variants", "no-kd", "--full-seeds", "1", "--ranks", "1"]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "ablate.py"), *options, *settings],
        cwd=out.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def finished(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder, and the output of the call after the kill."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    job = start(settings, out)
    try:
        for path in (out / "full" / "metrics.jsonl", out / "full" / "summary.json"):
            wait_for(path, job)
        started = psutil.Process(job.pid).children(recursive=True)
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive, "what the ablation had started outlived it"
    code, output = finish(start(settings, out))
    assert code == 0, output
    return out, output


def test_goes_on_where_it_was_killed(finished: tuple[Path, str]) -> None:
    out, output = finished
    assert "[1/2] full: the recipe as it is (nothing changed) - done before" in output
    assert "[2/2] no-kd: without the soft targets (objective.kd_weight=0.0)" in output
    assert (out / "no-kd" / "model" / "model.safetensors").exists()


def test_one_thing_is_different(finished: tuple[Path, str]) -> None:
    """The same batches and masks: equal scores before the first step; and a loss without soft targets."""
    out, _ = finished
    full, no_kd = read_rows(out / "full"), read_rows(out / "no-kd")
    before = [next(row for row in rows if row["step"] == 0) for rows in (full, no_kd)]
    assert before[0]["heldout_mlm_loss"] == before[1]["heldout_mlm_loss"]
    assert any("loss_kd" in row for row in full)
    assert not any("loss_kd" in row for row in no_kd)
    assert any("loss_cos" in row for row in no_kd)


def test_table_and_figure(finished: tuple[Path, str]) -> None:
    out, output = finished
    saved = json.loads((out / "ablation.json").read_text())
    assert [row["name"] for row in saved["variants"]] == ["full", "no-kd"]
    for row in saved["variants"]:
        last = [entry for entry in read_rows(out / row["name"]) if "heldout_kl" in entry][-1]
        assert last["step"] == 24
        assert row["heldout"]["heldout_kl"] == last["heldout_kl"]
        assert f"{last['heldout_kl']:.4f}" in output
    full, no_kd = (row["heldout"]["heldout_kl"] for row in saved["variants"])
    assert saved["variants"][1]["difference"]["heldout_kl"] == pytest.approx(no_kd - full)
    assert "SMALL SCALE" in output
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "`objective.kd_weight=0.0`" in (out / "ablation.md").read_text()


def test_scoring_anew_gives_what_the_run_has_measured(
    finished: tuple[Path, str], settings: list[str]
) -> None:
    """Runs without a teacher at hand are scored anew: the same code, on the full recipe, must give what its own run has
    measured."""
    out, _ = finished
    heldout = json.loads((out / "full" / "summary.json").read_text())["heldout"]
    measured = {key: value for key, value in heldout.items() if key in METRICS}
    score = scorer(parse_config(settings, ""))
    assert score(out / "full" / "student") == pytest.approx(measured, rel=1e-5)


def test_other_settings_are_refused_by_name(finished: tuple[Path, str], settings: list[str]) -> None:
    out, _ = finished
    words = ["--out", str(out), "--variants", "no-kd", *settings, "--optimizer.lr=0.02"]
    with pytest.raises(ValueError, match=r"(?s)out/full holds a run.*optimizer.lr: 0.01 -> 0.02\ngive those"):
        ablate.main(words)
    assert not (out / "full-seed-1").exists()
