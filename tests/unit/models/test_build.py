"""Teacher and student as the configuration asks for them: what is refused, and what the message says."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train.models.build
from data_prep.shard_format.manifest import Manifest
from train.build import heldout_scoring, load_manifest, read_inputs
from train.config import Config
from train.config_sections.data import DataConfig
from train.config_sections.model import ModelConfig
from train.config_sections.objective import ObjectiveConfig
from train.config_sections.training import TrainingConfig
from train.errors import UserError
from train.loop.trainer import DistillationModule
from train.models.build import build_student, build_teacher, open_teachers, teacher_folders
from train.models.families import FAMILIES, family_of, has_head
from train.models.loading import load_masked_lm
from train.models.students import make_student
from train.models.teacher import Teacher
from train.models.tokenizer_checks import check_vocabulary
from train.objective.build import build_objective

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
PLAIN_MLM = ObjectiveConfig(kd_weight=0.0, cosine_weight=0.0)


def scratch(**settings: Any) -> Config:
    return Config(
        model=ModelConfig(teacher=None, layer_map="distilbert", scratch=settings), objective=PLAIN_MLM
    )


def test_a_score_outside_a_run_has_the_recipe_s_teacher_and_windows(
    shards_folder: str, teacher_folder: str
) -> None:
    config = Config(
        model=ModelConfig(
            teacher=[teacher_folder, teacher_folder], teacher_weights=[3.0, 1.0], teacher_dtype="bf16"
        ),
        data=DataConfig(shards=shards_folder, sequence_length=32),
    )
    _, evaluation, teacher = heldout_scoring(config, "cpu")
    assert teacher.shares == (0.75, 0.25)
    assert teacher.models[0].dtype == torch.float32
    scores = evaluation(teacher.models[0], teacher)
    assert scores["heldout_kl"] == pytest.approx(0.0, abs=1e-6)
    too_long = replace(config, data=replace(config.data, sequence_length=32_000))
    with pytest.raises(ValueError, match="has no held-out windows of 32000 tokens"):
        heldout_scoring(too_long, "cpu")


@pytest.mark.parametrize("projection", [False, True])
def test_what_the_engine_trains_and_saves_holds_no_teacher(teacher_folder: str, projection: bool) -> None:
    config = Config(
        model=ModelConfig(teacher=teacher_folder), objective=ObjectiveConfig(projection=projection)
    )
    teacher = Teacher([load_masked_lm(teacher_folder)])
    student = make_student(teacher.models[0])
    module = DistillationModule(student, build_objective(config.objective, student, teacher))
    added = set(module.state_dict()) - {f"student.{name}" for name in student.state_dict()}
    assert all(name.startswith("objective.projection") for name in added)
    assert bool(added) == projection
    assert sum(p.numel() for p in module.parameters()) == student.num_parameters() + 32 * 32 * projection


def test_a_manifest_that_records_another_tokenizer_is_refused(shards_folder: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards_folder, tmp_path / "shards"))
    info = load_manifest(str(folder)).tokenizer
    for name, value in (("mask_id", 1), ("vocab_size", info.vocab_size + 1), ("special_ids", (*range(6),))):
        tokenizer = replace(info, **{name: value})
        replace(Manifest.load(shards_folder), tokenizer=tokenizer).save(folder)
        value = re.escape(repr(value))
        message = rf"manifest.json: tokenizer.{name} is {value}, but .*/tokenizer has .* run write_shards"
        with pytest.raises(UserError, match=message):
            load_manifest(str(folder))
        inputs = read_inputs(Config(data=DataConfig(shards=str(folder))), "cpu")
        assert set(inputs.as_record()) == {
            "deepspeed.config"
        }  # not compared with a run's before it is refused
        with pytest.raises(UserError, match=message):  # after the ranks have been compared
            _ = inputs.manifest
    shutil.rmtree(folder / "tokenizer")  # nothing to compare with
    load_manifest(str(folder))


@pytest.fixture(scope="module")
def bare_folder(teacher_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The teacher without its MLM head."""
    folder = Path(shutil.copytree(teacher_folder, tmp_path_factory.mktemp("bare") / "model"))
    load_masked_lm(teacher_folder).base_model.save_pretrained(folder)
    return str(folder)


def test_a_name_is_the_hub_s_where_there_is_no_such_folder(teacher_folder: str) -> None:
    teachers = Config(model=ModelConfig(teacher=[teacher_folder, "models/bert"]))
    assert [folder.is_on_hub for folder in teacher_folders(teachers)] == [False, True]
    begun = Config(model=ModelConfig(teacher=None, start_from="models/bert"), objective=PLAIN_MLM)
    assert [folder.is_on_hub for folder in teacher_folders(begun)] == [True]


def test_a_folder_without_head_teaches_where_no_term_predicts_tokens(
    teacher_folder: str, bare_folder: str, shards_folder: str
) -> None:
    manifest = Manifest.load(shards_folder)
    weights = {"kd_weight": 0.0, "mlm_weight": 0.0, "cosine_weight": 0.0, "relation_weight": 1.0}
    for name in (teacher_folder, bare_folder):
        model = ModelConfig(teacher=name, layer_map="every_other")
        config = Config(
            model=model, data=DataConfig(sequence_length=16), objective=ObjectiveConfig(**weights)
        )
        folders = open_teachers(config, manifest.tokenizer)
        teacher, student = build_teacher(config, "cpu", folders), build_student(config, manifest, folders)
        assert has_head(student) == teacher.has_head == (name == teacher_folder)
        build_objective(config.objective, student, teacher)
    for on in ("kd_weight", "mlm_weight", "mse_weight"):
        objective = ObjectiveConfig(**{**weights, on: 1.0})
        with pytest.raises(
            UserError, match=rf"{bare_folder} has no MLM head: .*or an objective that predicts no"
        ):
            build_student(replace(config, objective=objective), manifest)


def test_a_model_is_trained_on_in_its_own_architecture(
    teacher_folder: str, bare_folder: str, shards_folder: str
) -> None:
    manifest = Manifest.load(shards_folder)

    def trained(name: str, **settings: Any) -> Any:
        model = ModelConfig(teacher=None, start_from=name, layer_map="distilbert", **settings)
        return build_student(Config(model=model, objective=PLAIN_MLM), manifest)

    expected = load_masked_lm(teacher_folder)
    model = trained(teacher_folder)
    assert model.training
    assert type(model) is type(expected)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())
    with_new = trained(bare_folder, new_head=True)
    assert has_head(with_new)
    assert torch.equal(
        with_new.bert.embeddings.word_embeddings.weight, expected.get_input_embeddings().weight
    )
    with pytest.raises(
        UserError, match=rf"{bare_folder} has no MLM head: .*; give --model.new_head=true to put"
    ):
        trained(bare_folder)
    with pytest.raises(
        UserError, match=rf"model.new_head=True: {teacher_folder} has an MLM head already; leave"
    ):
        trained(teacher_folder, new_head=True)
    with pytest.raises(
        UserError, match=r"model.start_from='\S+none': no Hugging Face folder .* give the folder"
    ):
        trained(f"{bare_folder}/none")
    other = replace(manifest.tokenizer, fingerprint="0" * 64)
    model_config = ModelConfig(teacher=None, start_from=bare_folder, layer_map="distilbert")
    remedy = "give a model.start_from with the shards' tokenizer"
    with pytest.raises(UserError, match=f"{bare_folder} has another tokenizer than the shards.*{remedy}"):
        open_teachers(Config(model=model_config, objective=PLAIN_MLM), other)


@pytest.mark.parametrize("dropout", [True, False])
def test_dropout_is_left_out_where_it_is_said(teacher_folder: str, shards_folder: str, dropout: bool) -> None:
    manifest = Manifest.load(shards_folder)
    training = TrainingConfig(dropout=dropout)
    config = Config(model=ModelConfig(teacher=teacher_folder, layer_map="every_other"), training=training)
    for each in (config, replace(scratch(model_type="bert", **SMALL), training=training)):
        model = build_student(each, manifest)
        assert {module.training for module in model.modules()} == {dropout}
        assert max(model.config.to_dict().get(key, 0) for key in ("dropout", "hidden_dropout_prob")) == 0.1


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_from_scratch_has_the_shards_vocabulary_and_ids(model_type: str, shards_folder: str) -> None:
    """It may be the teacher of a later run without a tokenizer beside it."""
    manifest = Manifest.load(shards_folder)
    one_layer = {FAMILIES[model_type].num_layers_field: 1}
    model = build_student(scratch(model_type=model_type, **one_layer), manifest)
    check_vocabulary("it", model.config, None, manifest.tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == manifest.tokenizer.vocab_size
    assert family_of(model).num_layers(model) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "quux"}, "unknown model_type 'quux'"),
        ({"model_type": ["bert"]}, r"unknown model_type \['bert'\]"),
        ({"model_type": "bert", "depth": 3}, "bert has no 'depth'"),
        ({"model_type": "bert", "vocab_size": 5}, "vocab_size comes from the shards"),
        ({"model_type": "bert", "hidden_size": 30, "num_attention_heads": 7}, "no bert can be made of"),
        ({"model_type": "bert", "hidden_size": "wide"}, "no bert can be made of"),
    ],
)
def test_impossible_models_are_refused(shards_folder: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_student(scratch(**settings), Manifest.load(shards_folder))


def taught(teacher_folder: str, sequence_length: int = 16, **objective: Any) -> Config:
    model = ModelConfig(
        teacher=[teacher_folder, teacher_folder],
        teacher_weights=[1.0, 3.0],
        layer_map="random",
        student_layers=1,
        student_width=16,
    )
    data = DataConfig(sequence_length=sequence_length)
    return Config(model=model, data=data, objective=ObjectiveConfig(**objective))


def test_teachers_and_objective_follow_the_configuration(teacher_folder: str, shards_folder: str) -> None:
    config = taught(teacher_folder, projection=True, layer_cosine_weight=1.0, layer_pairs=[(1, 4)])
    teacher, student = build_teacher(config, "cpu"), build_student(config, Manifest.load(shards_folder))
    assert teacher.shares == (0.25, 0.75)
    assert teacher.output_hidden_states
    objective = build_objective(config.objective, student, teacher)
    assert [each.weight.shape for each in objective.projections] == [(32, 16), (32, 16)]
    assert not build_teacher(taught(teacher_folder), "cpu").output_hidden_states


def test_what_the_models_cannot_do_is_refused_by_name(teacher_folder: str, shards_folder: str) -> None:
    build_teacher(taught(teacher_folder, sequence_length=64), "cpu")
    with pytest.raises(ValueError, match=r"data.sequence_length=65: teacher .* has positions for 64 tokens"):
        build_teacher(taught(teacher_folder, sequence_length=65), "cpu")
    config = taught(teacher_folder)
    student = build_student(config, Manifest.load(shards_folder))
    with pytest.raises(ValueError, match=r"16 wide.*objective.projection=true.*objective.cosine_weight=0$"):
        build_objective(config.objective, student, build_teacher(config, "cpu"))
    config = taught(teacher_folder, cosine_weight=0.0, layer_cosine_weight=1.0, layer_pairs=[(1, 4)])
    with pytest.raises(ValueError, match=r"or set objective.layer_cosine_weight=0$"):
        build_objective(config.objective, student, build_teacher(config, "cpu"))


@pytest.mark.parametrize(
    ("weights", "needed"),
    [
        ({}, True),
        ({"kd_weight": 0.0, "cosine_weight": 0.0}, False),
        ({"kd_weight": 0.0}, True),
        ({"kd_weight": 0.0, "cosine_weight": 0.0, "mse_weight": 1.0}, True),
    ],
)
def test_a_teacher_is_needed_where_a_term_reads_it(weights: dict[str, float], needed: bool) -> None:
    assert ObjectiveConfig(**weights).needs_teacher == needed


def test_a_teacher_is_read_once(
    teacher_folder: str, shards_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vocabulary check, the running teacher, its fp32 original and the student come of one reading each."""
    read: list[str] = []
    for name in ("teacher_config", "folder_fingerprint", "load_masked_lm"):
        original = getattr(train.models.build, name)
        monkeypatch.setattr(
            train.models.build,
            name,
            lambda *args, name=name, original=original: read.append(name) or original(*args),
        )
    config, manifest = taught(teacher_folder, projection=True), Manifest.load(shards_folder)
    config = replace(config, model=replace(config.model, teacher=teacher_folder, teacher_weights=None))
    folders = open_teachers(config, manifest.tokenizer)
    assert read == ["teacher_config", "folder_fingerprint"]
    teacher = build_teacher(config, "cpu", folders)
    build_student(config, manifest, folders)
    assert teacher.models[0] is folders[0].model
    assert sorted(read) == ["folder_fingerprint", "load_masked_lm", "teacher_config"]
