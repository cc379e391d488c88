"""Loading with refusals, freezing, ensembles, precision."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)

from data_prep.shard_format.manifest import tokenizer_info
from tests.unit.models.test_families import MODELS, SIZES
from train.config import ObjectiveConfig
from train.errors import UserError
from train.evaluation.teacher_precision import check_teacher_precision
from train.models.families import family_of
from train.models.loading import check_vocabulary, folder_fingerprint, load_masked_lm, load_with_saved_head
from train.models.students import make_student
from train.models.teacher import Teacher, load_teacher, normalised_shares, running_copy
from train.objective.build import build_objective
from train.objective.distillation import DistillationLoss


@pytest.fixture(scope="module")
def batch():
    return torch.randint(5, 60, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_missing_head_is_refused_in_every_family(name, tmp_path):
    model = MODELS[name]()
    encoder = getattr(model, family_of(model).encoder)
    encoder.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"has no MLM head: .* missing from its weights.*its config.json names"
    ):
        load_masked_lm(str(tmp_path))
    model.save_pretrained(tmp_path)
    load_masked_lm(str(tmp_path))


@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertModel])
def test_a_classifier_is_no_teacher(kind, tmp_path):
    kind(BertConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"no MLM head: cls.predictions.bias.*names {kind.__name__}"):
        load_masked_lm(str(tmp_path))


def test_one_missing_tensor_is_refused(teacher_folder, tmp_path):
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    for name, message in (
        (
            "cls.predictions.transform.dense.bias",
            "no MLM head: cls.predictions.transform.dense.bias is missing",
        ),
        (
            "bert.encoder.layer.1.output.dense.weight",
            "incomplete: bert.encoder.layer.1.output.dense.weight is",
        ),
    ):
        kept = {key: value for key, value in weights.items() if key != name}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_masked_lm(str(folder))


@pytest.mark.parametrize(
    "key", ["bert.encoder.layer.0.attention.self.relative.weight", "classifier.layers.9.weight"]
)
def test_weights_that_nobody_asks_for_are_none_of_a_lost_layer(teacher_folder, tmp_path, key):
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, key: torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    assert load_masked_lm(str(folder)).config.num_hidden_layers == 4
    assert load_with_saved_head(folder).config.num_hidden_layers == 4


def test_other_broken_folders_are_refused(teacher_folder, tmp_path):
    with pytest.raises(UserError, match="there is no model folder"):
        load_masked_lm(str(tmp_path / "nothing"))
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 65}))
    with pytest.raises(
        ValueError, match=r"layer.0.intermediate.dense.bias has shape \(64,\), by its config.json \(65,\)"
    ):
        load_masked_lm(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"its weights have 4 layers, its config.json 2"):
        load_masked_lm(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"its weights cannot be read: "):
        load_masked_lm(str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"its weights cannot be read: "):
        load_masked_lm(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "electra"}))
    with pytest.raises(ValueError, match="model type 'electra' is not supported"):
        load_masked_lm(str(folder))


def test_loading_prints_no_table_and_no_bar(tmp_path, capfd):
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path)
    capfd.readouterr()
    with pytest.raises(ValueError):
        load_masked_lm(str(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_the_teacher_is_frozen_and_in_no_one_elses_hands(teacher_folder, batch):
    teacher = load_teacher(teacher_folder)
    model = teacher.models[0]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"
    assert not isinstance(teacher, torch.nn.Module)
    output = teacher(batch).members[0]
    assert output.last_hidden.is_inference()
    assert output.hidden_states is None
    with torch.inference_mode():
        inputs = output.decoder_inputs(torch.tensor([3, 17]))
        logits = inputs.features @ inputs.weight.T + inputs.bias
        assert torch.allclose(logits, model(batch).logits.flatten(0, 1)[[3, 17]], atol=1e-6)
    holder = torch.nn.Module()
    holder.student, holder.teacher = make_student(model), teacher
    holder.objective = DistillationLoss(ObjectiveConfig())
    assert not any("teacher" in name for name in holder.state_dict())


def test_the_teachers_number_format_by_choice(teacher_folder, batch):
    for dtype in (torch.bfloat16, torch.float16):
        teacher = load_teacher(teacher_folder, dtype=dtype)
        assert teacher(batch).members[0].last_hidden.dtype == dtype


def test_a_compiled_teacher_gives_the_same(teacher_folder, batch, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="aot_eager"))
    compiled, plain = Teacher([load_masked_lm(teacher_folder)], compile=True), load_teacher(teacher_folder)
    hidden = compiled(batch).members[0].last_hidden
    assert torch.allclose(hidden, plain(batch).members[0].last_hidden, atol=1e-5)


def test_an_ensemble_of_two_teachers_trains_a_student(teacher_folder, batch, tmp_path):
    """The averaged targets get nearer, and both teachers stay as they were."""
    torch.manual_seed(4)
    second = load_masked_lm(teacher_folder)
    for parameter in second.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    second.save_pretrained(tmp_path)
    teacher = load_teacher([teacher_folder, str(tmp_path)], weights=[1, 3])
    assert teacher.shares == (0.25, 0.75)
    assert teacher.tokenizer_fingerprint is not None
    before = [copy.deepcopy(model.state_dict()) for model in teacher.models]
    student = make_student(load_masked_lm(teacher_folder)).eval()
    objective = build_objective(ObjectiveConfig(mlm_weight=0), student, teacher)
    optimizer = torch.optim.AdamW(student.parameters(), 2e-3)
    from train.data.masking import MaskedBatch

    masked = MaskedBatch(batch, torch.zeros(2, 1).long(), batch[:, :1], torch.ones(2, 1, dtype=torch.bool))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        terms = objective(student, masked, teacher(batch))
        terms.loss.backward()
        optimizer.step()
        losses.append((terms.kd.item(), terms.cosine.item()))
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert losses[-1][1] < 0.5 * losses[0][1]
    for model, state in zip(teacher.models, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_ensembles_that_cannot_be_are_refused(teacher_folder, tmp_path):
    other = BertForMaskedLM(BertConfig(**SIZES | {"vocab_size": 70}))
    other.save_pretrained(tmp_path)
    vocabulary = load_masked_lm(teacher_folder).config.vocab_size
    with pytest.raises(ValueError, match=f"has {vocabulary} tokens, {tmp_path} has 70"):
        load_teacher([teacher_folder, str(tmp_path)])
    models = [MODELS["bert"](), MODELS["bert"]()]
    with pytest.raises(ValueError, match="tokenizers of a and b differ, though both have 64 tokens"):
        Teacher(models, names=["a", "b"], fingerprints=["1" * 64, "2" * 64])
    with pytest.raises(ValueError, match="tokenizers of b and c differ"):
        Teacher([*models, MODELS["bert"]()], names=["a", "b", "c"], fingerprints=[None, "1" * 64, "2" * 64])
    with pytest.raises(ValueError, match=r"the smallest counts for nothing beside the largest"):
        normalised_shares(2, [1e-300, 1e300])
    assert normalised_shares(2, [1e308, 1e308]) == (0.5, 0.5)


def test_vocabularies_that_differ_from_the_shards_are_refused(teacher_folder, tokenizer_folder):
    info = tokenizer_info(AutoTokenizer.from_pretrained(tokenizer_folder))
    config = load_masked_lm(teacher_folder).config
    fingerprint = folder_fingerprint(teacher_folder)
    check_vocabulary("t", config, fingerprint, info)
    check_vocabulary("t", config, None, info)
    with pytest.raises(
        ValueError, match=r"t has another tokenizer than the shards.*write the shards with --tokenizer t"
    ):
        check_vocabulary("t", config, "0" * 64, info)
    larger = dataclasses.replace(info, vocab_size=info.vocab_size + 1)
    with pytest.raises(
        ValueError, match=f"vocabulary of {info.vocab_size} tokens.*one of {info.vocab_size + 1}"
    ):
        check_vocabulary("t", config, None, larger)
    moved = dataclasses.replace(info, pad_id=9)
    with pytest.raises(ValueError, match="t has pad_token_id 0, the shards' tokenizer 9"):
        check_vocabulary("t", config, None, moved)
    padded = copy.deepcopy(config)
    padded.vocab_size += 8
    check_vocabulary("t", padded, fingerprint, info)
    with pytest.raises(ValueError, match="vocabulary of"):
        check_vocabulary("t", padded, None, info)


def test_sequences_longer_than_a_teacher_are_refused(teacher_folder):
    teacher = load_teacher(teacher_folder)
    teacher.check_sequence_length(64)
    with pytest.raises(ValueError, match=r"data.sequence_length=65: teacher .* has positions for 64 tokens"):
        teacher.check_sequence_length(65)


def test_no_tokenizer_no_fingerprint(tmp_path):
    assert folder_fingerprint(str(tmp_path)) is None


@pytest.mark.parametrize("content", ["{", '{"a": 1}', '{"added_tokens": [], "model": 3}'])
def test_a_tokenizer_that_cannot_be_read_is_said(content, teacher_folder, tmp_path, caplog):
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "model"))
    (folder / "tokenizer.json").write_text(content)
    assert folder_fingerprint(str(folder)) is None
    assert "its tokenizer cannot be compared" in caplog.text


def checked(original, batch, dtype=torch.float32, name="x"):
    """The report of a model that runs in `dtype`."""
    teacher = Teacher([running_copy(original, "cpu", dtype)], names=[name])
    (report,) = check_teacher_precision(teacher, [original], batch)
    return report


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_running_copy_is_what_transformers_would_load(name, dtype, tmp_path):
    """Weights rounded once; buffers, such as ModernBERT's rotary frequencies, in the format they are loaded in."""
    MODELS[name]().save_pretrained(tmp_path)
    original = load_masked_lm(str(tmp_path))
    own = running_copy(original, "cpu", dtype)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="sdpa")
    for parts in ("named_parameters", "named_buffers"):
        found, expected = dict(getattr(own, parts)()), dict(getattr(loaded, parts)())
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == value.dtype, key
            assert torch.equal(found[key], value), key
    assert original.dtype == torch.float32
    assert own.get_input_embeddings().weight is own.get_output_embeddings().weight


def test_half_precision_is_checked_against_fp32(teacher_folder, batch):
    original = load_masked_lm(teacher_folder)
    for dtype, limit in ((torch.float16, 1e-5), (torch.bfloat16, 1e-3)):
        report = checked(original, batch, dtype)
        assert report.dtype == str(dtype).removeprefix("torch.")
        assert 0 < report.kl < limit
        assert report.top1_agreement > 0.9
    report = checked(original, batch)
    assert (report.kl, report.top1_agreement) == (0, 1)


def test_overflow_and_nan_are_refused(teacher_folder, batch):
    model = load_masked_lm(teacher_folder)
    with torch.no_grad():  # fp16 ends at 65,504
        model.bert.encoder.layer[2].intermediate.dense.weight.mul_(3e6)
        model.bert.encoder.layer[2].output.dense.weight.mul_(1e-6)
    checked(model, batch)
    checked(model, batch, torch.bfloat16)
    with pytest.raises(
        UserError, match=r"infinite or NaN logits in float16: set model.teacher_dtype to bf16 or fp32"
    ):
        checked(model, batch, torch.float16)
    model.cls.predictions.bias.data[3] = float("nan")
    with pytest.raises(UserError, match=r"teacher x gives infinite or NaN logits in float32: check it"):
        checked(model, batch)


def test_a_teacher_that_half_precision_changes_is_refused(teacher_folder, batch):
    original = load_masked_lm(teacher_folder)
    teacher = Teacher([running_copy(original, "cpu", torch.float16)])
    with torch.no_grad():
        teacher.models[0].cls.predictions.bias.add_(torch.randn(teacher.vocab_size).half())
    with pytest.raises(UserError, match=r"is not the model it is in float32: KL 0\.\d+ nats per token"):
        check_teacher_precision(teacher, [original], batch)
