"""launch/doctor.py on this machine alone: the recipe, its teacher, its disk."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoModelForMaskedLM, BertConfig, DistilBertConfig, DistilBertForMaskedLM

from data_prep.shard_format.manifest import Manifest
from launch import doctor
from launch.common.cli import parse_config
from launch.preflight.recipe_checks import (
    CPU_TOKENS,
    check_recipe,
    check_teacher,
    check_tokenizer,
    needed_disk_gib,
)
from tests.distributed.pretraining import small_settings
from train.checkpointing.checkpoint import Retention, checkpoint_name
from train.checkpointing.integrity import write_facts
from train.distributed.rendezvous import free_port


@pytest.mark.parametrize("keep_last", [1, 5])
@pytest.mark.parametrize(("precision", "size"), [("fp16", 14), ("cpu", 16)])
def test_disk_is_for_every_checkpoint_that_is_kept(
    keep_last: int, precision: str, size: int, tmp_path: Path
) -> None:
    """Weights, an fp32 master and two moments in each, and one in the making; the student in fp32 once."""
    BertConfig().save_pretrained(tmp_path)
    with torch.device("meta"):
        student = DistilBertForMaskedLM(DistilBertConfig())
    checkpoints = [tmp_path / checkpoint_name(step) for step in range(4500, 0, -500)]
    for number, path in enumerate(checkpoints):
        path.mkdir()
        write_facts(path, 4500 - 500 * number, 1, {}, heldout_mlm_loss=9.0 - number)  # the oldest is the best
    kept = len(checkpoints) - len(Retention(keep_last).superfluous(checkpoints))
    words = [f"--model.teacher={tmp_path}", f"--checkpoint.keep_last={keep_last}"]
    words += [f"--deepspeed.config=ds_configs/{precision}.json", "--training.max_steps=4500"]
    milestones = "--checkpoint.milestone_every_steps=1000"
    unscored = ["--objective.kd_weight=0", "--objective.mlm_weight=0"]  # no loss says which is the best
    encoder = student.distilbert
    for more, model, copies in (
        ([], student, kept + 1),
        ([milestones], student, kept + 1 + 4),
        (unscored, encoder, kept),
    ):
        expected = model.num_parameters() * (size * copies + 4) / 2**30
        assert needed_disk_gib(parse_config([*words, *more], "")) == pytest.approx(expected, rel=1e-6)


def test_disk_is_for_the_student_that_the_recipe_makes(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)

    def needed(*settings: str) -> float:
        return needed_disk_gib(
            parse_config([f"--model.teacher={tmp_path}", "--checkpoint.keep_last=9", *settings], "")
        )

    all_layers = f"--model.layer_map={list(range(12))}"
    assert needed(all_layers) == needed("--model.layer_map=random", "--model.student_layers=12")
    assert needed(all_layers) > needed()
    assert (
        needed("--model.layer_map=random", "--model.student_width=384", "--objective.projection=true")
        < needed()
    )


def test_teacher_that_overflows_at_a_late_token(teacher_folder: str, tmp_path: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(teacher_folder)
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight[CPU_TOKENS - 1] = 1e6
    model.save_pretrained(tmp_path)
    (finding,) = check_teacher(parse_config([f"--model.teacher={tmp_path}", "--data.sequence_length=32"], ""))
    assert not finding.ok
    assert "infinite or NaN logits in float16" in finding.result


def test_a_teacher_without_head_is_well_where_no_term_predicts_tokens(
    shards_folder: str, teacher_folder: str, tmp_path: Path
) -> None:
    shutil.copytree(teacher_folder, tmp_path / "bare")
    AutoModelForMaskedLM.from_pretrained(teacher_folder).base_model.save_pretrained(tmp_path / "bare")
    words = [*small_settings(shards_folder, teacher_folder), f"--model.teacher={tmp_path}/bare"]
    (finding,) = check_teacher(parse_config(words, ""))
    assert not finding.ok
    assert "has no MLM head" in finding.result + finding.remedy
    relations = [f"--objective.{term}_weight=0" for term in ("kd", "mlm", "cosine")]
    config = parse_config([*words, *relations, "--objective.relation_weight=1"], "")
    findings = [*check_teacher(config), check_tokenizer(config), *check_recipe(config, 2)]
    assert all(finding.ok for finding in findings), findings
    assert "no MLM head; float16 against fp32: 1 - cos" in findings[0].result
    words += ["--model.teacher=null", f"--model.start_from={tmp_path}/bare", "--objective.kd_weight=0"]
    words += ["--objective.cosine_weight=0", "--model.layer_map=distilbert"]
    for more, expected in ((["--model.new_head=true"], True), ([], False)):
        student = check_recipe(parse_config([*words, *more], ""), 2)[-1]
        assert student.ok == expected
    assert student.remedy == "give --model.new_head=true to put a new one on it"


def test_this_machine_with_a_run_folder_in_a_file(
    teacher_folder: str, shards_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The probe as a plain subprocess; every check is well but the planted one."""
    (tmp_path / "file").write_text("in the way")
    words = [f"--data.shards={shards_folder}", f"--model.teacher={teacher_folder}"]
    words += ["--data.sequence_length=32", "--model.layer_map=every_other"]
    words += ["--training.global_batch_size=32", "--training.micro_batch_size=8"]
    words += [f"--run.dir={tmp_path / 'file' / 'run'}", "--skip-all-reduce", f"--master-port={free_port()}"]
    hub_logging.set_verbosity_warning()
    assert doctor.main(words) == 1
    assert hub_logging.get_verbosity() == hub_logging.ERROR  # no line for every question that is repeated
    said = capsys.readouterr().out
    failed = [line for line in said.splitlines() if "FAILED" in line]
    assert [line.split("│")[1].strip() for line in failed] == ["run folder", "disk"]
    assert "Not a directory" in " ".join(said.replace("│", " ").split())  # it may be broken in two lines
    assert "give --run.dir" in said
    assert "21 checks, 2 failed" in said


@pytest.mark.parametrize(
    ("settings", "check", "message"),
    [
        (["--model.layer_map=[0,99]"], "student", r"names layers \[99\] that the teacher does not have"),
        (["--model.layer_map=distilbert"], "student", "of a 12-layer teacher"),
        (["--model.student_width=33"], "student", "must be a multiple of its heads. width"),
        (["--data.sequence_length=65"], "student", "positions for 64 tokens"),
        (
            ["--objective.layer_cosine_weight=1", "--objective.layer_pairs=[[1, 9]]"],
            "student",
            r"layer.*9|9.*layer",
        ),
        (["--deepspeed.config=/none.json"], "engine", "/none.json': no such file"),
        (["--training.global_batch_size=65536"], "steps", "fewer than one batch of 65536"),
        (["--schedule.warmup_steps=99999", "--training.max_steps=null"], "steps", "more than the run's"),
    ],
)
def test_a_recipe_that_would_be_refused(
    settings: list[str], check: str, message: str, shards_folder: str, teacher_folder: str
) -> None:
    words = [*small_settings(shards_folder, teacher_folder), *settings]
    assert needed_disk_gib(parse_config(words, "")) >= 1  # another check refuses it
    findings = {finding.check: finding for finding in check_recipe(parse_config(words, ""), 1)}
    assert [name for name, finding in findings.items() if not finding.ok] == [check]
    assert re.search(message, f"{findings[check].result}; {findings[check].remedy}")


@pytest.mark.parametrize(
    "settings",
    [
        ["--objective.layer_cosine_weight=1", "--objective.layer_pairs=[[1, 3]]"],
        ["--model.student_width=16", "--objective.projection=true"],
    ],
)
def test_a_recipe_that_would_be_taken(settings: list[str], shards_folder: str, teacher_folder: str) -> None:
    words = [*small_settings(shards_folder, teacher_folder), *settings]
    assert [f.result for f in check_recipe(parse_config(words, ""), 1) if not f.ok] == []


def test_a_corpus_that_holds_nothing_out_is_a_warning(
    shards_folder: str, teacher_folder: str, tmp_path: Path
) -> None:
    settings = small_settings(shards_folder, teacher_folder)
    findings = {finding.check: finding for finding in check_recipe(parse_config(settings, ""), 1)}
    assert re.fullmatch(r"\d+ windows of \d+ tokens", findings["held-out text"].result)
    manifest = Manifest.load(shards_folder)
    without = tmp_path / "shards"
    shutil.copytree(shards_folder, without)
    dataclasses.replace(manifest, splits={**manifest.splits, "heldout": ()}).save(without)
    settings = small_settings(str(without), teacher_folder)
    findings = {finding.check: finding for finding in check_recipe(parse_config(settings, ""), 1)}
    assert findings["held-out text"].ok
    assert "holds out no window of" in findings["held-out text"].result
    assert "--heldout-fraction" in findings["held-out text"].remedy


def test_a_recipe_whose_micro_batch_is_found_on_the_gpus(shards_folder: str, teacher_folder: str) -> None:
    words = [*small_settings(shards_folder, teacher_folder), "--training.micro_batch_size=auto"]
    assert all(finding.ok for finding in check_recipe(parse_config(words, ""), 1))
