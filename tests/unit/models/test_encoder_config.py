"""A teacher's config.json with wrong values: one message that names the folder and the field."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.finetuning.squad_tokenizers import wordpiece
from tests.unit.models.test_families import MODELS
from train.errors import UserError
from train.models.build import teacher_config
from train.models.encoder_config import read_tokenizer
from train.models.loading import load_masked_lm
from train.models.tokenizer_checks import load_tokenizer


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "abc"),
        ("hidden_size", 10**12),
        ("num_attention_heads", 0),
        ("num_attention_heads", [4]),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", None),
        ("intermediate_size", {"a": [1]}),
        ("vocab_size", -1),
        ("pad_token_id", -7),
        ("layer_norm_eps", "small"),
        ("hidden_dropout_prob", 1e308),
        ("initializer_range", -0.5),
        ("hidden_act", 3),
        ("hidden_act", "none"),
        ("dtype", [[]]),
        ("dtype", "abc"),
        ("model_type", []),
        ("is_decoder", True),
    ],
)
def test_a_config_of_wrong_values_is_one_message(
    key: str, value: Any, teacher_folder: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError) as raised:
        load_masked_lm(str(folder), teacher_config(str(folder)))
    message = str(raised.value)
    assert str(folder) in message
    assert len(message.splitlines()) == 1
    others = {
        "is_decoder": "decoder",
        "hidden_act": "hidden_act|none",
        "dtype": "dtype|torch|index",
        "model_type": "list",
    }
    assert re.search(others.get(key, key), message), message


@pytest.mark.parametrize("value", [{"": {}}, "512", True, [], -1, 0, "raw 1e999"])
def test_a_tokenizer_s_limit_that_is_no_number_is_one_message(
    value: Any, tokenizer_folder: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    text = json.dumps({**settings, "model_max_length": value}).replace('"raw 1e999"', "1e999")
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(
        UserError, match=r"tokenizer: model_max_length in its tokenizer_config.json is .*; give a number"
    ):
        read_tokenizer(folder)


def test_a_template_of_an_undefined_token_is_one_message(tmp_path: Path) -> None:
    wordpiece().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["post_processor"]["pair"][4]["SpecialToken"]["id"] = "[END]"
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"tokenizer.json names a token that it does not define .*copy"):
        load_tokenizer(str(tmp_path), SimpleNamespace(vocab_size=1000))


def test_nested_json_and_other_damage_of_a_config_is_one_message(tmp_path: Path) -> None:
    for text in ("[" * 100_000, "7", "[]", "null", "", "\0"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=rf"model.teacher: {tmp_path}: its config cannot be read"):
            teacher_config(str(tmp_path))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_random_changes_of_a_config_raise_nothing_else(name: str, tmp_path: Path) -> None:
    MODELS[name]().save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    rng, accepted = random.Random(name), 0
    for _ in range(8):
        value = rng.choice(["abc", 0, -7, [], [1], None, {"a": 1}, 10**12, 1.5, True, 1e308, [[[]]]])
        (tmp_path / "config.json").write_text(json.dumps({**whole, rng.choice(sorted(whole)): value}))
        with contextlib.suppress(UserError):
            load_masked_lm(str(tmp_path))
            accepted += 1
    assert accepted < 8
