"""What launch/pretrain.py trains, on real ranks: kinds of students, teachers and objectives."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForMaskedLM

from data_prep.shard_format.files import read_json
from launch.common.cli import parse_config
from tests.distributed.pretraining import (
    finish,
    losses,
    start_alone,
    start_without_launcher,
    train,
)
from tests.unit.export.test_sentence_files import write_sentence_files
from train.build import heldout_scoring
from train.finetuning.embeddings import Embedder
from train.loop.metrics import read_rows
from train.models.loading import load_encoder
from train.objective.build import build_objective


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
