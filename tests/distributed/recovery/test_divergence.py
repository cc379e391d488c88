"""Runs whose losses stop being numbers at chosen steps: the way back, and what is said where there is none."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pretraining import finish, losses, start_without_launcher, wait_for, weights
from tests.distributed.ranks.forked import Forked, run_script
from tests.distributed.ranks.harness import rank_environment
from tests.paths import ROOT
from train.distributed.rendezvous import free_port
from train.loop.metrics import read_rows


def run_with_nan(steps: tuple[int, ...], rank: int, path: str, *arguments: str) -> None:
    """What `python path arguments` does, with NaN losses at some steps of one rank; fp16 is let onto the CPU."""
    from deepspeed.accelerator import get_accelerator

    from train.loop.trainer import Trainer
    from train.objective.distillation import DistillationLoss

    get_accelerator().is_fp16_supported = lambda: True
    at: dict[str, int] = {}
    seed_dropout, forward = Trainer._seed_dropout, DistillationLoss.forward

    def noted(self: Trainer, step: int, micro_step: int) -> None:
        at["step"] = step
        seed_dropout(self, step, micro_step)

    def broken(self: DistillationLoss, *args: Any, **named: Any) -> Any:
        terms = forward(self, *args, **named)
        hit = at.get("step") in steps and os.environ.get("RANK", "0") == str(rank)
        return {**terms, "loss": terms["loss"] * float("nan")} if hit else terms

    Trainer._seed_dropout, DistillationLoss.forward = noted, broken
    run_script(path, *arguments)


def start_with_nan(
    settings: list[str], run_dir: Path, ranks: int, steps: tuple[int, ...], *more: str
) -> list[Forked]:
    """The last rank is the one that breaks."""
    port, script = free_port(), str(ROOT / "launch/pretrain.py")
    words = [script, f"--run.dir={run_dir}", *settings, *more]
    environments = [rank_environment(rank, ranks, port) for rank in range(ranks)]
    return [Forked(run_with_nan, steps, ranks - 1, *words, environment=each) for each in environments]


def test_a_diverged_run_goes_back_without_the_bad_batch_and_a_kill_changes_nothing(
    settings: list[str], tmp_path: Path
) -> None:
    """One rank's loss is NaN in step 9, noticed at 12; the only checkpoint is that of step 0. The run is killed after
    the rollback and goes on. A run that never diverged, with the batch left out, ends with the same bits."""
    run_dir, given = tmp_path / "run", tmp_path / "given"
    words = [*settings, "--checkpoint.every_steps=1000", "--run.rollback_on_divergence=1"]
    jobs = start_with_nan(words, run_dir, 2, (9,))
    wait_for(run_dir / "rollbacks.json", jobs[0])
    wait_for(run_dir / "metrics.jsonl", jobs[0], lambda: "loss" in _rows_after_rollback(run_dir))
    for job in jobs:
        job.kill()
    output = "".join(finish(job)[1] for job in jobs)
    assert output.count("rollback 1 of 1: the loss is nan at step 12 or shortly before.") == 1
    assert "going on after step 0 without the batches of steps 9" in output
    ends = [finish(job) for job in start_with_nan(words, run_dir, 2, (9,))]
    assert [code for code, _ in ends] == [0, 0], ends
    assert "left out: the batches of steps 9 (rollbacks.json)" in ends[0][1]
    given.mkdir()
    shutil.copy(run_dir / "rollbacks.json", given)
    ends = [finish(job) for job in start_without_launcher(words, given, [], [])]
    assert [code for code, _ in ends] == [0, 0], ends
    assert losses(run_dir) == losses(given)
    assert weights(run_dir) == weights(given)
    (entry,) = json.loads((run_dir / "rollbacks.json").read_text())["rollbacks"]
    assert (entry["diverged_after_step"], entry["continued_from_step"], entry["left_out"]) == (12, 0, [9])
    rows = read_rows(run_dir)
    (logged,) = (row for row in rows if "rollback" in row)
    expected = {"rollback": 1, "rollback_diverged_at_step": 12, "rollback_left_out": 1}
    assert logged == {"step": 0, **expected}
    assert rows[-1]["step"] == 24
    tokens = {row["step"]: row["tokens"] for row in rows if "tokens" in row}
    assert (tokens[8], tokens[24]) == (8 * 32 * 32, 23 * 32 * 32)


def _rows_after_rollback(run_dir: Path) -> set[str]:
    """Names of the figures in metrics.jsonl since the run has gone back."""
    rows = read_rows(run_dir)
    first = next((number for number, row in enumerate(rows) if "rollback" in row), len(rows))
    return {name for row in rows[first:] for name in row}


def test_after_the_last_rollback_the_run_ends_with_the_bad_batch(settings: list[str], tmp_path: Path) -> None:
    words = [*settings, "--run.rollback_on_divergence=1", "--run.log_every_steps=1"]
    (job,) = start_with_nan(words, tmp_path, 1, (2, 6))
    code, output = finish(job)
    assert code == 1, output
    assert output.count("rollback 1 of 1:") == output.count("error:") == 1
    assert "going on after step 0 without the batches of steps 2" in output
    assert "error: the loss is nan at step 7 or shortly before." in output
    assert "Bad batch: of step 6; the last has the sequences " in output
    assert " and 24 more: see them with launch/inspect_batch.py --config RUN/config.yaml --step 6" in output


def test_overflows_in_fp16_end_with_our_message(settings: list[str], tmp_path: Path) -> None:
    """At the smallest loss scale DeepSpeed raises an exception of its own, in the 18th step of the shipped JSON."""
    words = [*settings, "--deepspeed.config=ds_configs/fp16.json", "--checkpoint.every_steps=1000"]
    (job,) = start_with_nan(words, tmp_path, 1, tuple(range(24)))
    code, output = finish(job)
    assert code == 1, output
    assert "error: gradients were infinite or NaN in 20 steps in a row up to step 20." in output
    assert "ds_configs/bf16.json" in output
    assert "Bad batches: of step 0, 1, 2, 3, 4, 5, 6, 7 and 12 more; the last has the sequences " in output
    assert "already at minimum" not in output


def test_a_rollback_in_fp16_that_goes_on_on_another_number_of_ranks(
    settings: list[str], tmp_path: Path
) -> None:
    """Two ranks go back to step 8 and are killed; one goes on, as one that never diverged and leaves out as much."""
    run_dir, given, bad = tmp_path / "run", tmp_path / "given", (9, 10, 11)
    words = [*settings, "--deepspeed.config=ds_configs/fp16.json", "--checkpoint.every_steps=8"]
    words += ["--run.rollback_on_divergence=1", "--run.stop_after_non_finite=3", "--run.log_every_steps=1"]
    jobs = start_with_nan(words, run_dir, 2, bad)
    wait_for(run_dir / "rollbacks.json", jobs[0])
    wait_for(run_dir / "metrics.jsonl", jobs[0], lambda: "loss" in _rows_after_rollback(run_dir))
    for job in jobs:
        job.kill()
    output = "".join(finish(job)[1] for job in jobs)
    assert "rollback 1 of 1: gradients were infinite or NaN in 3 steps in a row up to step 12." in output
    assert "going on after step 8 without the batches of steps 9, 10, 11" in output
    given.mkdir()
    shutil.copy(run_dir / "rollbacks.json", given)
    for folder, steps in ((run_dir, bad), (given, ())):
        (job,) = start_with_nan(words, folder, 1, steps)
        code, output = finish(job)
        assert code == 0, output
    assert "left out: the batches of steps 9, 10, 11 (rollbacks.json)" in output
    curves = [
        {
            row["step"]: (row["loss"], row["loss_scale"], row["tokens"])
            for row in read_rows(folder)
            if "loss" in row
        }
        for folder in (run_dir, given)
    ]
    assert list(curves[0]) == list(curves[1]) == [step for step in range(1, 25) if step not in (10, 11, 12)]
    for step, row in curves[0].items():
        assert row == pytest.approx(curves[1][step], rel=1e-3), step
