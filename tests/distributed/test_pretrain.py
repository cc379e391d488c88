"""launch/pretrain.py on real ranks: the run folder, kills, signals, refusals. What it trains: test_students.py."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

from launch.common.cli import parse_config
from tests.distributed.pretraining import (
    STEPS,
    finish,
    losses,
    ranks_of,
    start,
    start_alone,
    start_command,
    train,
    wait_for,
    weights,
)
from tests.paths import ROOT
from train.build import heldout_scoring
from train.loop.metrics import read_rows


def test_run_folder(undisturbed: Path) -> None:
    left = {path.name for path in undisturbed.iterdir()}
    assert {
        "config.yaml",
        "ds_config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "model",
        "student",
    } <= left
    assert os.readlink(undisturbed / "student") == "model"
    rows = read_rows(undisturbed)
    logged = [row for row in rows if "loss" in row]
    assert [row["step"] for row in logged] == list(range(4, STEPS + 1, 4))
    expected = {
        "step",
        "epoch",
        "tokens",
        "loss",
        "loss_kd",
        "loss_mlm",
        "loss_cos",
        "lr",
        "grad_norm",
        "loss_scale",
    }
    expected |= {
        "skipped_steps",
        "trust_ratio_min",
        "trust_ratio_median",
        "trust_ratio_max",
        "tokens_per_s",
        "mfu",
    }
    expected |= {"share_kd", "share_mlm", "share_cos"}
    expected |= {"time_data", "time_teacher", "time_student", "time_optimizer", "memory_gib"}
    assert expected <= set(logged[0])
    assert logged[-1]["tokens"] == STEPS * 32 * 32
    assert losses(undisturbed)[-1] < losses(undisturbed)[0]
    heldout = [row for row in rows if "heldout_mlm_loss" in row]
    assert [row["step"] for row in heldout] == [0, 8, 16, STEPS]
    assert "teacher_heldout_mlm_loss" in heldout[0]
    assert "teacher_heldout_mlm_loss" not in heldout[1]
    assert heldout[-1]["heldout_mlm_loss"] < heldout[0]["heldout_mlm_loss"]
    kept = sorted(path.name for path in (undisturbed / "checkpoints").glob("step-*"))
    assert kept == ["step-00000020", "step-00000024"]
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["heldout"]["heldout_mlm_loss"] == heldout[-1]["heldout_mlm_loss"]


def test_total_loss_is_the_weighted_sum(undisturbed: Path) -> None:
    for row in (row for row in read_rows(undisturbed) if "loss" in row):
        total = 5 * row["loss_kd"] + 2 * row["loss_mlm"] + row["loss_cos"]
        assert row["loss"] == pytest.approx(total, rel=1e-5)
        assert row["share_mlm"] == pytest.approx(2 * row["loss_mlm"] / row["loss"])
        assert row["share_kd"] + row["share_mlm"] + row["share_cos"] == pytest.approx(1, rel=1e-5)


def test_the_start_up_is_timed_by_stage(undisturbed: Path) -> None:
    (start,) = (row for row in read_rows(undisturbed) if "startup_imports" in row)
    assert start["step"] == 1
    stages = {name for name in start if name.startswith("startup_")}
    assert {"startup_joining_ranks", "startup_engine", "startup_first_step"} <= stages
    assert all(start[name] >= 0 for name in stages)


def test_two_ranks_follow_the_curve_of_one(undisturbed: Path, on_one_rank: Path) -> None:
    """Same batches, masks and dropout; only the order of fp32 sums differs."""
    assert losses(undisturbed) == pytest.approx(losses(on_one_rank), rel=1e-6)


def test_no_steps_leave_the_student_as_it_was_made(
    settings: list[str], teacher_folder: str, tmp_path: Path
) -> None:
    """The untrained cut, scored and exported: the start of every curve."""
    output = train(settings, tmp_path / "run", "--training.max_steps=0", ranks=1)
    assert "nothing was trained" in output
    assert "rows of metrics.jsonl are gone" not in output
    (heldout,) = (row for row in read_rows(tmp_path / "run") if "heldout_mlm_loss" in row)
    assert heldout["step"] == 0
    assert "teacher_heldout_mlm_loss" in heldout
    student, teacher = (
        AutoModelForMaskedLM.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "run" / "model", teacher_folder)
    )
    own, theirs = (
        "distilbert.transformer.layer.1.attention.q_lin.weight",
        "bert.encoder.layer.2.attention.self.query.weight",
    )
    assert torch.equal(student[own], teacher[theirs])


def test_kill_of_a_rank_then_same_command_ends_bit_for_bit(
    settings: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "killed"
    job = start(settings, run_dir)
    wait_for(run_dir / "checkpoints" / "step-00000004" / "complete.json", job)
    victim = random.choice(ranks_of(job))
    victim.send_signal(signal.SIGKILL)
    code, output = finish(job)
    assert code != 0, output
    assert not (run_dir / "model").exists()
    output = train(settings, run_dir)
    assert f"continuing from {run_dir}/checkpoints/step-" in output
    assert losses(run_dir) == losses(undisturbed)
    assert weights(run_dir) == weights(undisturbed)


def test_sigterm_saves_exits_75_and_the_next_call_continues(
    settings: list[str], on_one_rank: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "stopped"
    job = start_alone(settings, run_dir, "--checkpoint.every_steps=1000")
    wait_for(run_dir / "metrics.jsonl", job, lambda: any("loss" in row for row in read_rows(run_dir)))
    job.send_signal(signal.SIGTERM)
    code, output = finish(job)
    assert code == 75, output
    assert "run again to continue" in output
    (saved,) = (run_dir / "checkpoints").glob("step-*")
    assert 4 <= json.loads((saved / "complete.json").read_text())["step"] < STEPS
    code, output = finish(start_alone(settings, run_dir, "--checkpoint.every_steps=1000"))
    assert code == 0, output
    assert weights(run_dir) == weights(on_one_rank)


def test_a_finished_run_is_left_alone(settings: list[str], on_one_rank: Path) -> None:
    before = (on_one_rank / "metrics.jsonl").read_bytes()
    code, output = finish(start_alone(settings, on_one_rank))
    assert code == 0
    assert "is finished: 24 steps" in output
    closing = output.splitlines()[-5:]
    assert [line.split()[0] for line in closing] == ["training", "held-out", "agreement", "speed", "model"]
    assert f"{on_one_rank}/model; beside its teacher: python launch/report.py {on_one_rank}" in closing[-1]
    assert (on_one_rank / "metrics.jsonl").read_bytes() == before


def test_changed_settings_are_refused(settings: list[str], on_one_rank: Path) -> None:
    code, output = finish(start_alone(settings, on_one_rank, "--optimizer.lr=0.5"))
    assert code == 2
    assert "optimizer.lr: 0.01 -> 0.5" in output
    assert "Traceback" not in output


def test_changed_settings_that_are_allowed_are_told_and_begin_a_new_row(
    settings: list[str], tmp_path: Path
) -> None:
    """The checkpoint lies between two rows: losses of another objective make no mean with those before."""
    words = [
        *settings,
        "--training.max_steps=8",
        "--checkpoint.every_steps=6",
        "--evaluation.every_steps=1000",
    ]
    code, output = finish(start_alone(words, tmp_path))
    assert code == 0, output
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000008")
    changed = [*words, "--objective.cosine_weight=0", "--checkpoint.allow_changed_config=true"]
    code, output = finish(start_alone(changed, tmp_path))
    assert code == 0, output
    assert "changed configuration:\n  objective.cosine_weight: 1.0 -> 0.0\n" in output
    before, after = (row for row in read_rows(tmp_path) if "loss" in row)
    assert (before["step"], after["step"]) == (4, 8)
    assert "loss_cos" in before
    assert "loss_cos" not in after
    assert after["loss"] == pytest.approx(5 * after["loss_kd"] + 2 * after["loss_mlm"], rel=1e-5)


def test_short_sequences_first_then_long_ones(settings: list[str], tmp_path: Path) -> None:
    """Stopped in the short phase and gone on with into the long one, as if never stopped."""
    words = [*settings, "--schedule.short_sequence_length=16", "--schedule.short_share=0.8"]
    words += ["--training.max_steps=60", "--checkpoint.every_steps=1000", "--evaluation.every_steps=1000"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    code, output = finish(start_alone(words, whole))
    assert code == 0, output
    job = start_alone(words, stopped)
    wait_for(stopped / "metrics.jsonl", job, lambda: any("loss" in row for row in read_rows(stopped)))
    job.send_signal(signal.SIGUSR1)
    code, output = finish(job)
    assert code == 75, output
    (saved,) = (stopped / "checkpoints").glob("step-*")
    states = torch.load(saved / "mp_rank_00_model_states.pt", weights_only=False)["halfling"]
    assert len(states["loss_history"]) == states["step"] // 4 * 4  # as many as were logged
    code, output = finish(start_alone(words, stopped))
    assert code == 0, output
    assert losses(stopped) == losses(whole)
    assert weights(stopped) == weights(whole)
    tokens = {row["step"]: row["tokens"] for row in read_rows(whole) if "tokens" in row}
    assert tokens[48] == 48 * 32 * 16
    assert tokens[60] == 48 * 32 * 16 + 12 * 32 * 32


def test_spikes_are_told_with_their_sequences_and_steps_traced(
    settings: list[str], shards_folder: str, tmp_path: Path
) -> None:
    """Batches of two sequences that teach next to nothing: noise enough for half a deviation. One held-out window for
    two ranks."""
    words = [*settings, "--training.global_batch_size=2", "--training.micro_batch_size=null"]
    words += ["--evaluation.max_windows=1"]
    words += ["--training.max_steps=60", "--run.spike_deviations=0.5", "--profile", "--optimizer.lr=1e-6"]
    output = train(words, tmp_path)
    spikes = [json.loads(line) for line in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    assert output.count("loss spike: ") == len(spikes) > 0
    assert "training.micro_batch_size: 1 sequences fit" in output
    assert "  micro_batch_size: 1\n" in (tmp_path / "config.yaml").read_text()
    step = str(spikes[0]["batch_of_step"])
    inspect = ["launch/inspect_batch.py", "--config", str(tmp_path / "config.yaml"), "--step", step]
    code, shown = finish(start_command(*inspect, "--show", "2"))
    assert code == 0, shown
    assert len(spikes[0]["window_ids"]) == 2
    for window_id in spikes[0]["window_ids"]:
        assert f"window {window_id}" in shown
    assert spikes[0]["loss"] > spikes[0]["median"]
    for rank in range(2):
        trace = json.loads((tmp_path / "profile" / f"trace-rank-{rank}.json").read_text())
        assert any("gloo:all_reduce" in event.get("name", "") for event in trace["traceEvents"])
    assert "aten::" in (tmp_path / "profile" / "operations.txt").read_text()
    (first,) = (row for row in read_rows(tmp_path) if "teacher_heldout_mlm_loss" in row)
    config = parse_config(["--config", str(tmp_path / "config.yaml")], "")
    _, evaluation, teacher = heldout_scoring(config, "cpu")
    alone = evaluation(teacher.models[0], teacher)
    for key in ("teacher_heldout_mlm_loss", "teacher_heldout_accuracy"):
        assert first[key] == pytest.approx(alone[key], rel=1e-6)


def test_a_checkpoint_of_another_model_is_refused(
    settings: list[str], on_one_rank: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(on_one_rank, run_dir)
    words = ["--model.student_layers=1", "--model.layer_map=[0]", "--checkpoint.allow_changed_config=true"]
    code, output = finish(start_alone(settings, run_dir, *words))
    assert code == 2, output
    assert "holds another model than the configuration describes" in output
    assert "Traceback" not in output


def test_what_deepspeed_refuses_is_one_message(settings: list[str], tmp_path: Path) -> None:
    engine = json.loads((ROOT / "ds_configs" / "cpu.json").read_text())
    engine["zero_optimization"]["allgather_bucket_size"] = "many"
    (tmp_path / "ds.json").write_text(json.dumps(engine))
    code, output = finish(start_alone(settings, tmp_path / "run", f"--deepspeed.config={tmp_path}/ds.json"))
    assert code == 2, output
    assert "/ds.json': DeepSpeed refuses zero_optimization.allgather_bucket_size='many': " in output
    assert "Traceback" not in output


def test_without_shards_one_message_says_how_to_make_them(tmp_path: Path) -> None:
    code, output = finish(start([], tmp_path / "run", f"--data.shards={tmp_path}/none"))
    assert code == 2
    assert output.count("error:") == 1, output
    assert "write_shards.py" in output
    assert "Traceback" not in output


def test_export_of_a_checkpoint_gives_the_runs_student(undisturbed: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    command = ["launch/export.py", str(undisturbed), str(tmp_path / "out")]
    code, output = finish(start_command(*command))
    assert code == 0, output
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights(undisturbed)
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "out").config.n_layers == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token == "[MASK]"
    assert "heldout_mlm_loss" in (tmp_path / "out" / "README.md").read_text()
    moved = tmp_path / "elsewhere" / f"step-{STEPS:08d}"
    shutil.copytree(undisturbed / "checkpoints" / moved.name, moved)
    code, output = finish(start_command("launch/export.py", str(moved), str(tmp_path / "out-of-moved")))
    assert code == 0, output
    assert (tmp_path / "out-of-moved" / "model.safetensors").read_bytes() == weights(undisturbed)
    code, output = finish(start_command(*command))
    assert code == 2
    assert "exists; give another folder" in output
