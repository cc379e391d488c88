"""Loading masked language models: every refusal, and silence."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    ElectraConfig,
    ElectraForPreTraining,
)

from data_prep.shard_format.tokenizer_info import tokenizer_info
from launch.planner.models import named_model
from tests.unit.models.test_families import MODELS, SIZES
from train.errors import UserError
from train.models.families import family_of, has_head
from train.models.loading import (
    load_encoder,
    load_masked_lm,
    load_with_new_head,
    load_with_saved_head,
    with_new_head,
)
from train.models.tokenizer_checks import check_vocabulary, folder_fingerprint


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_missing_head_is_refused_in_every_family(name, tmp_path):
    model = MODELS[name]()
    encoder = getattr(model, family_of(model).encoder)
    encoder.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"has no MLM head: .* missing from its weights.*its config.json names .*mlm_weight and mse_weight 0.*"
        rf"--model.start_from={tmp_path} --model.new_head=true",
    ):
        load_masked_lm(str(tmp_path))
    bare = load_encoder(str(tmp_path))
    assert not has_head(bare)
    weights = {name.removeprefix("pooler."): value for name, value in encoder.state_dict().items()}
    assert all(torch.equal(value, weights[name]) for name, value in bare.state_dict().items())
    model.save_pretrained(tmp_path)
    load_masked_lm(str(tmp_path))
    assert has_head(load_encoder(str(tmp_path)))


def test_electras_discriminator_is_an_encoder_without_head(tmp_path):
    ElectraForPreTraining(ElectraConfig(**SIZES, embedding_size=24)).save_pretrained(tmp_path)
    assert not has_head(load_encoder(str(tmp_path)))
    assert not has_head(named_model(str(tmp_path), with_head=False))
    with pytest.raises(
        ValueError, match=r"no MLM head: generator_lm_head.bias.* names ElectraForPreTraining"
    ):
        load_masked_lm(str(tmp_path))


def test_a_new_head_is_the_seeds_and_its_decoder_the_embeddings(teacher_folder):
    encoder = load_masked_lm(teacher_folder).base_model
    state = torch.random.get_rng_state()
    first, again, other = (with_new_head(encoder, seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    dense = [model.cls.predictions.transform.dense.weight for model in (first, again, other)]
    assert torch.equal(dense[0], dense[1])
    assert not torch.equal(dense[0], dense[2])
    assert first.cls.predictions.decoder.weight is first.get_input_embeddings().weight
    assert all(
        torch.equal(value, first.bert.state_dict()[name]) for name, value in encoder.state_dict().items()
    )
    assert first.get_input_embeddings().weight.data_ptr() != encoder.get_input_embeddings().weight.data_ptr()


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
        with pytest.raises(ValueError, match=f"incomplete: {message.partition(': ')[2]}"):
            load_encoder(str(folder))


@pytest.mark.parametrize(
    "key", ["bert.encoder.layer.0.attention.self.relative.weight", "classifier.layers.9.weight"]
)
def test_weights_that_nobody_asks_for_are_none_of_a_lost_layer(teacher_folder, tmp_path, key):
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, key: torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    assert load_masked_lm(str(folder)).config.num_hidden_layers == 4
    assert load_with_saved_head(folder).config.num_hidden_layers == 4


@pytest.mark.parametrize(
    "load",
    [
        load_masked_lm,
        lambda name: load_with_saved_head(Path(name)),
        lambda name: load_with_new_head(name, AutoModelForSequenceClassification, 0, {"num_labels": 2}),
    ],
    ids=["masked", "saved head", "new head"],
)
def test_weights_that_do_not_fit_are_refused_by_every_loader(load, teacher_folder, tmp_path):
    """transformers would cut layers off, or draw numbers, without a word."""
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "model"))

    def refused(message):
        with pytest.raises(UserError, match=message):
            load(str(folder))

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 65}))
    refused(r"layer.0.intermediate.dense.bias has shape \(64,\), by its config.json \(65,\)")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    refused("model: its weights have 4 layers, its config.json 2")
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.1.attention.self.query.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(r"model is incomplete: .*layer.1.attention.self.query.weight is missing")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    refused("model: its weights cannot be read: ")


def test_other_broken_folders_are_refused(teacher_folder, tmp_path):
    with pytest.raises(UserError, match="there is no model folder"):
        load_masked_lm(str(tmp_path / "nothing"))
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"its weights cannot be read: "):
        load_masked_lm(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "albert"}))
    with pytest.raises(ValueError, match="model type 'albert' is not supported"):
        load_masked_lm(str(folder))


def test_loading_prints_no_table_and_no_bar(tmp_path, capfd):
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path)
    capfd.readouterr()
    with pytest.raises(ValueError):
        load_masked_lm(str(tmp_path))
    assert capfd.readouterr() == ("", "")


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


def test_no_tokenizer_no_fingerprint(tmp_path):
    assert folder_fingerprint(str(tmp_path)) is None


@pytest.mark.parametrize("content", ["{", '{"a": 1}', '{"added_tokens": [], "model": 3}'])
def test_a_tokenizer_that_cannot_be_read_is_refused(content, teacher_folder, tmp_path):
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "model"))
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"model: its tokenizer cannot be read: .*; copy the folder again, or take"
    ):
        folder_fingerprint(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(teacher_folder, tmp_path, value):
    model = load_masked_lm(teacher_folder)
    name, weight = next(iter(model.named_parameters()))
    weight.data[0, 0] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{re.escape(name)} holds NaN or infinity"):
        load_masked_lm(str(tmp_path))
