"""The embedding term: models of every family and kind of pooling against the formula in fp64; what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.shard_format.manifest import Manifest
from tests.unit.export.test_sentence_files import write_sentence_files
from tests.unit.models.test_families import MODELS
from tests.unit.objective.given import assert_gradients, gradients
from tests.unit.objective.test_relation_objective import model_of, unmasked
from train.config import Config
from train.config_sections.data import DataConfig
from train.config_sections.model import ModelConfig
from train.config_sections.objective import POOLINGS, ObjectiveConfig
from train.errors import UserError
from train.models.build import build_teacher, open_teachers
from train.models.families import family_of
from train.models.students import make_student
from train.models.teacher import Teacher
from train.objective.build import build_objective
from train.objective.reference import reference_embeddings
from train.objective.untrained import freeze_untrained

EMBEDDINGS = ObjectiveConfig(kd_weight=0, mlm_weight=0, cosine_weight=0, embedding_weight=2)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_loss_and_gradients_are_the_formulas(kind: str, pooling: str, padded: bool) -> None:
    """Of models without heads, one of which stops nowhere early; a count of tokens as under accumulation."""
    original = model_of(kind).base_model.double()
    student = make_student(copy.deepcopy(original), 2).double().eval()
    teacher, masked = Teacher([original], pooling=pooling), unmasked(3)
    mask = (torch.arange(10) < torch.tensor([[10], [7], [4]])).long() if padded else None
    objective = build_objective(EMBEDDINGS, student, teacher)
    terms = objective(student, masked, teacher(masked.input_ids, mask), attention_mask=mask, num_tokens=25.0)
    terms["loss"].backward()
    assert set(terms) == {"loss", "loss_embedding"}
    again = copy.deepcopy(student)
    again.zero_grad()
    own, theirs = (
        family_of(model).encode(model, masked.input_ids, mask).last_hidden for model in (again, original)
    )
    expected = reference_embeddings(own, theirs.detach(), pooling, mask, 25.0)
    (2 * expected).backward()
    torch.testing.assert_close(terms["loss"], 2 * expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(terms["loss_embedding"], expected.detach(), rtol=1e-10, atol=1e-12)
    assert_gradients(student, gradients(again), 1e-12)


def test_beside_relations_of_an_inner_layer_the_models_run_to_their_end() -> None:
    original, masked = model_of("bert"), unmasked()
    student = make_student(copy.deepcopy(original), 2).eval()
    relations = replace(EMBEDDINGS, embedding_weight=0, relation_weight=3, relation_layers=[(1, 2)])
    both = replace(relations, embedding_weight=2)
    assert (relations.needs_student_output, relations.needs_teacher_output) == (False, False)
    assert (both.needs_student_output, both.needs_teacher_output, both.needs_masks) == (True, True, False)
    teacher = Teacher([original], relation_layers=[2], pooling="mean")
    losses = [
        build_objective(each, student, teacher)(student, masked, teacher(masked.input_ids))["loss"].item()
        for each in (relations, EMBEDDINGS, both)
    ]
    assert losses[2] == pytest.approx(losses[0] + losses[1], rel=1e-6)
    assert losses[1] > 1e-3
    sums = build_objective(both, student, teacher).score_text(
        student, teacher(masked.input_ids), masked.input_ids
    )
    assert 2 * sums["loss_embedding"].item() / masked.input_ids.numel() == pytest.approx(losses[1], rel=1e-6)


def test_the_whole_encoder_is_trained() -> None:
    original = model_of("bert")
    student = make_student(copy.deepcopy(original.base_model), 2)
    teacher = Teacher([original.base_model], pooling="cls")
    assert freeze_untrained(build_objective(EMBEDDINGS, student, teacher), student, teacher, "cpu") == []


def test_a_narrower_student_is_refused() -> None:
    original = model_of("bert")
    student = make_student(copy.deepcopy(original), 2, "random", width=16)
    with pytest.raises(
        UserError, match=r"vectors are 16 wide, those of teacher teacher 0 32, .*relation_weight"
    ):
        build_objective(EMBEDDINGS, student, Teacher([original], pooling="mean"))


def test_a_recipes_teacher_pools_as_its_files_say(
    shards_folder: str, teacher_folder: str, tmp_path: Path
) -> None:
    """And is refused before any weight is read where they do not."""
    model_of("bert").config.save_pretrained(tmp_path)
    tokenizer = Manifest.load(shards_folder).tokenizer
    config = Config(
        model=ModelConfig(teacher=teacher_folder),
        data=DataConfig(shards=shards_folder, sequence_length=32),
        objective=EMBEDDINGS,
    )
    with pytest.raises(
        UserError, match=r"objective.embedding_weight: teacher .* has no 1_Pooling/config.json"
    ):
        open_teachers(config, tokenizer)
    write_sentence_files(tmp_path)
    for path in Path(teacher_folder).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = replace(config, model=ModelConfig(teacher=str(tmp_path)))
    assert build_teacher(config, "cpu", open_teachers(config, tokenizer)).pooling == "mean"
    plain = replace(config, objective=ObjectiveConfig())
    assert build_teacher(plain, "cpu").pooling is None
