"""Which folders are taken for encoders with a head that is known, and how others are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel

from launch.export import read_texts
from train.models.loading import load_with_saved_head


def test_a_head_that_would_be_lost_and_other_architectures_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertLMHeadModel(BertConfig(vocab_size=72, **sizes)).save_pretrained(tmp_path / "causal")
    with pytest.raises(ValueError, match=r"causal: BertLMHeadModel is not among the heads known here"):
        load_with_saved_head(tmp_path / "causal")
    GPT2LMHeadModel(GPT2Config(vocab_size=72, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "gpt"
    )
    with pytest.raises(ValueError, match=r"gpt is a gpt2, which is no encoder of text"):
        load_with_saved_head(tmp_path / "gpt")


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "be')
    with pytest.raises(ValueError, match=rf"{tmp_path}: its config cannot be read: "):
        load_with_saved_head(tmp_path)


def test_weights_and_config_that_do_not_belong_together_are_named(
    teacher_folder: str, tmp_path: Path
) -> None:
    """transformers would cut two layers off without a word."""
    folder = shutil.copytree(teacher_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"model: its weights have 4 layers, its config.json 2"):
        load_with_saved_head(folder)
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 65}))
    with pytest.raises(ValueError, match=r"has shape .*64.*, by its config.json .*65"):
        load_with_saved_head(folder)


def test_sentences_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    assert read_texts(tmp_path / "lines.txt") == ["one", "two"]
    (tmp_path / "lines.txt").write_bytes(b"\xff\xfeo\x00")
    with pytest.raises(ValueError, match=r"lines\.txt is not UTF-8: give a text file"):
        read_texts(tmp_path / "lines.txt")
