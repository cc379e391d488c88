"""Teacher and student as the configuration asks for them: what is refused, and what the message says."""

from __future__ import annotations

from typing import Any

import pytest

from data_prep.shard_format import Manifest
from train.config import Config, ModelConfig, ObjectiveConfig
from train.models import build_student, teacher_config

PLAIN_MLM = ObjectiveConfig(kd_weight=0.0, cosine_weight=0.0)


def scratch(**settings: Any) -> Config:
    return Config(
        model=ModelConfig(teacher=None, layer_map="distilbert", scratch=settings), objective=PLAIN_MLM
    )


def test_a_missing_teacher_is_named_with_the_remedy(tmp_path: Any) -> None:
    with pytest.raises(
        ValueError, match=r"model.teacher='\S+/none': no Hugging Face folder .* give the folder"
    ):
        teacher_config(str(tmp_path / "none"))


def test_a_model_from_scratch_has_the_shards_vocabulary(shards_folder: str) -> None:
    settings = {"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    manifest = Manifest.load(shards_folder)
    model = build_student(scratch(**settings), manifest)
    assert model.get_input_embeddings().weight.shape == (manifest.tokenizer.vocab_size, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "quux"}, "unknown model_type 'quux'"),
        ({"model_type": "bert", "depth": 3}, "bert has no 'depth'"),
        ({"model_type": "bert", "vocab_size": 5}, "vocab_size comes from the shards"),
        ({"model_type": "bert", "hidden_size": 30, "num_attention_heads": 7}, "no bert can be made of"),
        ({"model_type": "bert", "hidden_size": "wide"}, "no bert can be made of"),
    ],
)
def test_impossible_models_are_refused(shards_folder: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_student(scratch(**settings), Manifest.load(shards_folder))
