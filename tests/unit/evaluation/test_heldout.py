"""Held-out scores: the same whatever a run trains with, and however many ranks share the windows."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, PreTrainedModel

from data_prep.shard_format.manifest import Manifest
from tests.unit.export.test_sentence_files import write_sentence_files
from train.build import Parts, build_heldout, heldout_scoring
from train.config import Config
from train.config_sections.data import DataConfig, MaskingConfig
from train.config_sections.model import ModelConfig
from train.config_sections.objective import ObjectiveConfig
from train.config_sections.running import EvaluationConfig
from train.config_sections.training import TrainingConfig
from train.distributed.world import World
from train.evaluation.masking import LABEL, label_of_row, training_label
from train.loop.timing import Clock
from train.models.teacher import Teacher
from train.objective.build import build_objective
from train.run_folder import as_tree


@pytest.fixture
def config(shards_folder: str, teacher_folder: str) -> Config:
    return Config(
        model=ModelConfig(teacher=teacher_folder),
        data=DataConfig(shards=shards_folder, sequence_length=32),
        evaluation=EvaluationConfig(max_windows=5),
        training=TrainingConfig(micro_batch_size=32),
    )


@pytest.fixture
def student(teacher_folder: str) -> PreTrainedModel:
    return AutoModelForMaskedLM.from_pretrained(teacher_folder).eval()


def test_scores_are_those_of_one_masking_whatever_the_run_trains_with(
    config: Config, student: PreTrainedModel
) -> None:
    masking = MaskingConfig(probability=0.3, smoothing=0.0)
    other = replace(config, masking=masking, data=replace(config.data, seed=3))
    scores = [heldout_scoring(each, "cpu")[1](student) for each in (config, other)]
    assert scores[0] == scores[1]
    assert scores[0][LABEL] == "15 % of 32 tokens, uniform"


def test_a_watcher_sees_each_batch(config: Config, student: PreTrainedModel) -> None:
    """An evaluation on CPUs may last longer than run.hang_timeout_s."""
    config = replace(config, training=replace(config.training, micro_batch_size=2))
    _, heldout, teacher = heldout_scoring(config, "cpu")
    clock, places = Clock("cpu"), []
    trainer: Any = SimpleNamespace(
        clock=clock, engine=SimpleNamespace(module=SimpleNamespace(objective=None))
    )
    score = Parts.score(SimpleNamespace(heldout=heldout, student=student, teacher=teacher, trainer=trainer))
    student.get_input_embeddings().register_forward_pre_hook(lambda *forwarded: places.append(clock.where()))
    with clock.host_section("evaluation"):
        score()
    assert len(places) == len(set(places)) == 3
    assert clock.entered == 1


@pytest.mark.parametrize("with_head", [True, False])
def test_terms_without_logits_are_scored_of_the_text_as_it_is(
    config: Config, student: PreTrainedModel, teacher_folder: str, tmp_path: Path, with_head: bool
) -> None:
    """Of models without head nothing else is; a student that is its teacher has none to lose."""
    objective = ObjectiveConfig(
        kd_weight=0, mlm_weight=0, relation_weight=1, relation_layers=[(2, 3)], embedding_weight=1
    )
    sentence_teacher = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    write_sentence_files(sentence_teacher)
    _, evaluation, teacher = heldout_scoring(
        replace(config, model=ModelConfig(teacher=str(sentence_teacher)), objective=objective), "cpu"
    )
    scored = student if with_head else student.base_model
    terms = build_objective(objective, scored, teacher)
    scores = evaluation(scored, teacher, terms)
    assert scores["heldout_relation"] > 1e-4
    assert abs(scores["heldout_cos"]) < 1e-6
    assert abs(scores["heldout_embedding"]) < 1e-6
    assert ("heldout_mlm_loss" in scores, LABEL in scores) == (with_head, with_head)
    bare = Teacher([teacher.models[0].base_model], relation_layers=[3])
    again = evaluation(scored, bare, terms)
    assert {key: again[key] for key in ("heldout_relation", "heldout_cos")} == {
        key: scores[key] for key in ("heldout_relation", "heldout_cos")
    }
    assert "heldout_kl" not in again


@pytest.mark.parametrize("world_size", [1, 2, 5, 7, 64])
def test_any_number_of_ranks_gives_the_score_of_one(
    config: Config, student: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    """Also more ranks than windows: what the ranks without one add to the sum is nothing."""
    manifest = Manifest.load(config.data.shards)
    sums: list[torch.Tensor] = []

    def add_up(total: torch.Tensor) -> None:
        sums.append(total.clone())
        total.copy_(torch.stack(sums).sum(0))

    monkeypatch.setattr("torch.distributed.all_reduce", add_up)
    scores: dict[str, Any] = {}
    for rank in range(world_size):
        evaluation = build_heldout(config, manifest, World(rank, rank, world_size, world_size, "cpu"))
        assert evaluation is not None
        scores = evaluation(student)
    assert len(sums) == (world_size if world_size > 1 else 0)
    alone = build_heldout(config, manifest, World(0, 0, 1, 1, "cpu"))
    assert alone is not None
    expected = alone(student)
    label = expected.pop(LABEL)
    assert scores.pop(LABEL) == label
    assert scores == pytest.approx(expected, rel=1e-6)


def test_rows_of_older_runs_are_labelled_by_their_configuration() -> None:
    tree = as_tree(Config())
    row = {"step": 0, "heldout_mlm_loss": 2.0}
    assert label_of_row(row, tree) == "15 % of 512 tokens, by count**-0.7"
    tree["masking"] |= {"smoothing": 0.0, "whole_word": True}
    tree["data"]["seed"] = 3
    assert label_of_row(row, tree) == "15 % of 512 tokens, uniform, whole words, mask seed 3"
    assert label_of_row({**row, LABEL: "as said"}, tree) == "as said"
    assert label_of_row(row, {}) == "masking not recorded"
    for damaged in ({"probability": "x"}, {"smoothing": "0.7"}, {"probability": None}):
        masking = {**tree["masking"], **damaged}
        assert label_of_row(row, {**tree, "masking": masking}) == "masking not recorded"
        assert training_label({**tree, "masking": masking}) == "masking not recorded"
    tree["schedule"]["short_sequence_length"] = 128
    assert training_label(tree) == "15 % of 128 then 512 tokens, uniform, whole words"
