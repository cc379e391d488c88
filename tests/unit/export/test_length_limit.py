"""Every folder that leaves cuts long texts at its model's positions, whatever its tokenizer came with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import zero_to_fp32
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    pipeline,
)

from train.checkpointing.integrity import COMPLETE
from train.export.hugging_face import export_checkpoint, save_student_description
from train.models.encoder_config import write_length_limit

LONG = "[MASK] " + "the small model reads " * 100
SIZES: dict[str, Any] = {
    "vocab_size": 72,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
SIZES |= {"intermediate_size": 32, "type_vocab_size": 1, "pad_token_id": 0}
MODELS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=64)),
    # Its first position is behind the padding's id.
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, max_position_embeddings=65)),
}


def fill_long_text(folder: Path) -> None:
    fill = pipeline("fill-mask", model=str(folder), device="cpu")
    assert len(fill(LONG, top_k=2, tokenizer_kwargs={"truncation": True})) == 2
    encoder = pipeline("feature-extraction", model=str(folder), device="cpu")
    assert len(encoder(LONG, truncation=True)[0]) == 64


@pytest.mark.parametrize("kind", MODELS)
def test_an_export_takes_400_words(
    kind: str, tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights come from a stand-in for DeepSpeed's files; what is written is what a run writes."""
    model: PreTrainedModel = MODELS[kind]()
    weights = {f"student.{name}": value for name, value in model.state_dict().items()}
    monkeypatch.setattr(zero_to_fp32, "get_fp32_state_dict_from_zero_checkpoint", lambda folder, tag: weights)
    save_student_description(tmp_path, model, tokenizer_folder, None)
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    (tmp_path / "checkpoints" / "student-config").rename(checkpoint.parent / "kept")
    checkpoint.mkdir()
    (checkpoint.parent / "kept").rename(checkpoint / "student-config")
    description = AutoTokenizer.from_pretrained(checkpoint / "student-config")
    assert description.model_max_length == 64
    description.model_max_length = 512  # as checkpoints before November 2026 have it
    description.save_pretrained(checkpoint / "student-config")
    (checkpoint / COMPLETE).write_text(json.dumps({"step": 1, "world_size": 1, "files": {}}))
    assert export_checkpoint(checkpoint, tmp_path / "out") == 0
    fill_long_text(tmp_path / "out")


def test_a_tokenizer_without_settings_gets_the_limit(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\n")
    model = BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=64))
    model.save_pretrained(tmp_path)
    write_length_limit(tmp_path, model.config)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer("the " * 400, truncation=True)["input_ids"]) == 64
    with torch.no_grad():
        model(**tokenizer("the " * 400, truncation=True, return_tensors="pt"))
