"""Which folders are taken for encoders with a head that is known, and how others are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from launch.export import read_texts
from train.models.loading import load_with_saved_head


def test_other_architectures_and_heads_that_would_be_lost_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    for name, decoder in (("causal", False), ("decoder", True)):
        model = BertLMHeadModel(BertConfig(vocab_size=72, is_decoder=decoder, **sizes))
        model.save_pretrained(tmp_path / name)
    GPT2LMHeadModel(GPT2Config(vocab_size=72, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "gpt"
    )
    whole = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=72, dim=32, n_layers=1, n_heads=2)
    )
    whole.save_pretrained(tmp_path / "headless")
    config = (tmp_path / "headless" / "config.json").read_text()
    shutil.copytree(tmp_path / "headless", tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text(config.replace("ForSequenceClassification", "Odd"))
    whole.base_model.save_pretrained(tmp_path / "headless")
    (tmp_path / "headless" / "config.json").write_text(config)
    for name, message in (
        ("nowhere", "nowhere is not a Hugging Face folder: it holds no config.json"),
        ("causal", "causal: BertLMHeadModel is not among the heads known here: ForMaskedLM"),
        ("odd", "DistilBertOdd is not among the heads known here: ForMaskedLM"),
        ("decoder", "decoder is a bert decoder, which is no encoder of text"),
        ("gpt", "gpt is a gpt2, which is no encoder of text"),
        ("headless", r"headless is incomplete: classifier.bias, .* missing"),
    ):
        with pytest.raises(ValueError, match=message):
            load_with_saved_head(tmp_path / name)


def test_sentences_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    assert read_texts(tmp_path / "lines.txt") == ["one", "two"]
    (tmp_path / "lines.txt").write_bytes(b"\xff\xfeo\x00")
    with pytest.raises(ValueError, match=r"lines\.txt is not UTF-8: give a text file"):
        read_texts(tmp_path / "lines.txt")
