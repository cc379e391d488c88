"""launch/pretrain.py on real ranks: the run folder, kills, signals, refusals."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForMaskedLM

from data_prep.shard_format.files import read_json
from launch.cli import parse_config
from tests.distributed.pretraining import (
    STEPS,
    finish,
    losses,
    ranks_of,
    start,
    start_alone,
    start_command,
    start_without_launcher,
    train,
    wait_for,
    weights,
)
from tests.paths import ROOT
from tests.unit.export.test_sentence_files import write_sentence_files
from train.build import heldout_scoring
from train.finetuning.embeddings import Embedder
from train.loop.metrics import read_rows
from train.models.loading import load_encoder
from train.objective.build import build_objective


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


def test_a_compiled_student_follows_the_curve_of_a_plain_one(settings: list[str], tmp_path: Path) -> None:
    """LAMB under ZeRO-2, two ranks with two micro batches each, all terms of the loss: only the order of fp32 sums
    differs, once dropout, whose masks are others, is off."""
    common = ["--training.dropout=false", "--training.max_steps=6", "--run.log_every_steps=1"]
    train([*settings, *common], tmp_path / "plain")
    train([*settings, *common], tmp_path / "compiled", "--model.student_compile=true")
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    assert compiled == pytest.approx(plain, rel=1e-5)
    heldout = [
        [row["heldout_mlm_loss"] for row in read_rows(tmp_path / name) if "heldout_mlm_loss" in row]
        for name in ("plain", "compiled")
    ]
    assert heldout[1] == pytest.approx(heldout[0], rel=1e-5)
    expected, found = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("plain", "compiled")
    )
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=name)


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


def test_control_needs_the_teachers_shape_alone(settings: list[str], tmp_path: Path) -> None:
    control = ["--model.layer_map=random", "--objective.kd_weight=0", "--objective.cosine_weight=0"]
    code, output = finish(start_alone(settings, tmp_path, *control, "--training.max_steps=4"))
    assert code == 0, output
    (row,) = (row for row in read_rows(tmp_path) if "loss" in row)
    assert "loss_kd" not in row
    assert row["time_teacher"] < 0.05 * row["time_student"]
    heldout = [row for row in read_rows(tmp_path) if "heldout_mlm_loss" in row]
    assert "heldout_kl" not in heldout[0]


def test_narrow_student_with_a_projection_and_logit_mse(settings: list[str], tmp_path: Path) -> None:
    words = ["--model.layer_map=random", "--model.student_width=16", "--objective.mse_weight=0.01"]
    code, output = finish(start_alone([*settings, *words], tmp_path / "refused"))
    assert code == 2
    assert "objective.projection=true" in output
    words.append("--objective.projection=true")
    code, output = finish(start_alone([*settings, *words], tmp_path / "run", "--training.max_steps=4"))
    assert code == 0, output
    (row,) = (row for row in read_rows(tmp_path / "run") if "loss" in row)
    total = 5 * row["loss_kd"] + 2 * row["loss_mlm"] + row["loss_cos"] + 0.01 * row["loss_mse"]
    assert row["loss"] == pytest.approx(total, rel=1e-5)


def sentence_teacher(teacher_folder: str, folder: Path) -> Path:
    """Without its head, with sentence-transformers' files."""
    shutil.copytree(teacher_folder, folder)
    AutoModelForMaskedLM.from_pretrained(teacher_folder).base_model.save_pretrained(folder)
    write_sentence_files(folder)
    return folder


def test_relations_alone_on_a_narrow_student_with_adamw(
    settings: list[str], teacher_folder: str, tmp_path: Path
) -> None:
    """Two ranks, resumed on one, of a teacher without head: no masks, no vocabulary; what no gradient reaches stays as
    it was inherited; the student has no head either, and the teacher's files for sentence-transformers. AdamW's state
    comes along, LAMB's figures do not stand in the rows, and LAMB cannot go on from it."""
    from transformers import AutoModel

    bare = sentence_teacher(teacher_folder, tmp_path / "bare")
    words = [f"--model.teacher={bare}", "--model.student_width=16", "--objective.relation_weight=1"]
    words += [f"--objective.{term}_weight=0" for term in ("kd", "mlm", "cosine")]
    words += ["--optimizer.name=adamw", "--optimizer.lr=0.003"]
    first, second = start_without_launcher([*settings, *words], tmp_path, [], [])
    code, output = finish(first)
    assert (code, finish(second)[0]) == (0, 0), output
    assert "stay as they are" in output

    def last_layer(student: Any) -> torch.Tensor:
        return student.transformer.layer[-1].ffn.lin1.weight

    inherited = last_layer(AutoModel.from_pretrained(tmp_path / "student"))
    more = ["--training.max_steps=32", "--checkpoint.allow_changed_config=true"]
    code, output = finish(start_alone([*settings, *words, *more], tmp_path))
    assert code == 0, output
    rows = [row for row in read_rows(tmp_path) if "loss" in row]
    assert rows[-1]["loss"] == rows[-1]["loss_relation"] < 0.9 * rows[0]["loss"]
    assert not {"loss_kd", "loss_mlm", "top1_agreement", "trust_ratio_median"} & set(rows[0])
    scores = [row["heldout_relation"] for row in read_rows(tmp_path) if "heldout_relation" in row]
    assert scores[-1] < 0.9 * scores[0]
    assert not any("mlm" in key for row in read_rows(tmp_path) for key in row)
    student, found = AutoModel.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert student.config.dim == 16
    assert torch.equal(last_layer(student), inherited)
    assert not any(found.values()), found
    assert read_json(tmp_path / "student/1_Pooling/config.json", "")["word_embedding_dimension"] == 16
    assert "SentenceTransformer" in (tmp_path / "student/README.md").read_text()
    (tmp_path / "config.yaml").unlink()
    code, output = finish(start_alone([*settings, *words, *more, "--optimizer.name=lamb"], tmp_path))
    assert code == 2, output
    assert "step-00000032 was written with optimizer.name=adamw, whose state means nothing to lamb" in output


def test_sentence_vectors_alone(settings: list[str], teacher_folder: str, tmp_path: Path) -> None:
    """Of a teacher without head: two ranks follow the curve of one, and the student that leaves pools as its teacher
    and has the score that the run measured."""
    teacher_of = sentence_teacher(teacher_folder, tmp_path / "teacher")
    words = [*settings, f"--model.teacher={teacher_of}", "--objective.embedding_weight=1"]
    words += [f"--objective.{term}_weight=0" for term in ("kd", "mlm", "cosine")]
    words += ["--optimizer.name=adamw", "--optimizer.lr=0.003", "--model.layer_map=random"]
    first, second = start_without_launcher(words, tmp_path / "two", [], [])
    code, output = finish(first)
    assert (code, finish(second)[0]) == (0, 0), output
    assert "stay as they are" not in output
    code, output = finish(start_alone(words, tmp_path / "one"))
    assert code == 0, output
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    rows = read_rows(tmp_path / "one")
    assert not {"loss_kd", "loss_mlm", "loss_cos"} & {name for row in rows for name in row}
    scores = [row["heldout_embedding"] for row in rows if "heldout_embedding" in row]
    assert scores[-1] < 0.9 * scores[0]
    folder = str(tmp_path / "one" / "model")
    config = parse_config(words, "")
    _, evaluation, teacher = heldout_scoring(config, "cpu")
    student = load_encoder(folder).eval()
    objective = build_objective(config.objective, student, teacher)
    assert evaluation(student, teacher, objective)["heldout_embedding"] == pytest.approx(scores[-1], rel=1e-4)
    assert Embedder(folder).pooling == "mean"


def test_ensemble_and_mapped_layers(settings: list[str], teacher_folder: str, tmp_path: Path) -> None:
    """Two teachers of other weights, one of them an encoder that was given a head and trained on: the student comes
    nearer to their mean."""
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_config(AutoConfig.from_pretrained(teacher_folder)).save_pretrained(tmp_path / "bare")
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(tmp_path / "bare")
    words = ["--model.teacher=null", f"--model.start_from={tmp_path}/bare", "--model.new_head=true"]
    words += ["--model.layer_map=distilbert", "--objective.kd_weight=0", "--objective.cosine_weight=0"]
    code, output = finish(start_alone([*settings, *words], tmp_path / "other", "--training.max_steps=4"))
    assert code == 0, output
    assert f"distil it with --model.teacher={tmp_path}/other/model" in output
    words = [
        f'--model.teacher=["{teacher_folder}", "{tmp_path}/other/model"]',
        "--model.teacher_weights=[1,2]",
    ]
    words += ["--objective.layer_cosine_weight=1", "--objective.layer_pairs=[[1,2],[2,4]]"]
    words += ["--objective.mlm_weight=0", "--objective.cosine_weight=0", "--model.layer_map=random"]
    code, output = finish(start_alone([*settings, *words], tmp_path / "run"))
    assert code == 0, output
    rows = [row for row in read_rows(tmp_path / "run") if "loss" in row]
    for term in ("loss_kd", "loss_layer_cos"):
        assert rows[-1][term] < 0.9 * rows[0][term], term


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
