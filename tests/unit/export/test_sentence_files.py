"""What sentence-transformers reads, carried from a teacher's folder to its student's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from deepspeed.utils import zero_to_fp32
from transformers import AutoModel, BertConfig, BertModel

from tests.unit.models.test_families import SIZES
from train.checkpointing.integrity import COMPLETE
from train.errors import UserError
from train.export.hugging_face import export_checkpoint, save_student_description
from train.export.sentence_files import carry_sentence_files
from train.models.loading import load_with_saved_head

CONFIG = BertConfig(**{**SIZES, "hidden_size": 16})
KINDS = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}


def write_sentence_files(folder: Path, **types: str) -> None:
    """As all-MiniLM-L6-v2 has them: of a model of width 32 that reads 512 tokens."""
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate({**KINDS, **types}.items())
    ]
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    for name, content in {
        "modules.json": modules,
        "config_sentence_transformers.json": {"__version__": {"sentence_transformers": "2.0.0"}},
        "sentence_bert_config.json": {"max_seq_length": 512, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
    }.items():
        (folder / name).write_text(json.dumps(content))


def files_of(folder: Path) -> dict[str, Any]:
    return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in folder.rglob("*.json")}


def test_files_are_fitted_to_the_student(tmp_path: Path) -> None:
    write_sentence_files(tmp_path / "teacher")
    carry_sentence_files(str(tmp_path / "teacher"), tmp_path, CONFIG)
    (tmp_path / "other").mkdir()
    carry_sentence_files(str(tmp_path / "other"), tmp_path, CONFIG)  # has none
    found, expected = files_of(tmp_path), files_of(tmp_path / "teacher")
    expected["sentence_bert_config.json"]["max_seq_length"] = 40
    expected["1_Pooling/config.json"]["word_embedding_dimension"] = 16
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("path", "kind"),
    [("2_Dense", "Dense"), ("../other", "Pooling"), ("..", "Pooling"), ("0_Transformer", "Transformer")],
)
def test_modules_with_weights_of_their_own_are_not_carried(
    path: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_sentence_files(tmp_path / "teacher", **{path: kind})
    (tmp_path / "student").mkdir()
    with caplog.at_level(logging.WARNING):
        carry_sentence_files(str(tmp_path / "teacher"), tmp_path / "student", CONFIG)
    assert f"sentence_transformers.models.{kind} has weights or code of its own" in caplog.text
    assert files_of(tmp_path / "student") == {}


@pytest.mark.parametrize("content", ["{", '{"a": 1}', '[{"path": 1}]'])
def test_a_damaged_list_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(UserError, match=r"modules.json is damaged .*; copy the folder again"):
        carry_sentence_files(str(tmp_path), tmp_path, CONFIG)


def test_files_that_the_list_names_must_be_there(tmp_path: Path) -> None:
    """A folder that was copied without its folders; nothing is left of the half."""
    write_sentence_files(tmp_path / "teacher")
    pooling, student = tmp_path / "teacher/1_Pooling/config.json", tmp_path / "student"
    student.mkdir()
    pooling.write_text("[1]")
    with pytest.raises(UserError, match=r"1_Pooling/config.json is damaged \(no JSON object\); copy the"):
        carry_sentence_files(str(tmp_path / "teacher"), student, CONFIG)
    pooling.unlink()
    with pytest.raises(
        UserError, match=r"has no 1_Pooling/config.json, which its modules.json names; copy the"
    ):
        carry_sentence_files(str(tmp_path / "teacher"), student, CONFIG)


@pytest.mark.parametrize("of_sentences", [True, False])
def test_a_model_without_head_leaves_as_one(
    of_sentences: bool, tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights come from a stand-in for DeepSpeed's files; what is written is what a run writes."""
    model = BertModel(CONFIG, add_pooling_layer=False)
    weights = {f"student.{name}": value for name, value in model.state_dict().items()}
    monkeypatch.setattr(zero_to_fp32, "get_fp32_state_dict_from_zero_checkpoint", lambda folder, tag: weights)
    (tmp_path / "teacher").mkdir()
    if of_sentences:
        write_sentence_files(tmp_path / "teacher")
    save_student_description(tmp_path, model, tokenizer_folder, str(tmp_path / "teacher"))
    checkpoint = tmp_path / "step-00000001"
    (tmp_path / "checkpoints").rename(checkpoint)
    (checkpoint / COMPLETE).write_text(json.dumps({"step": 1, "world_size": 1, "files": {}}))
    assert export_checkpoint(checkpoint, tmp_path / "out") == 0
    loaded, found = AutoModel.from_pretrained(
        tmp_path / "out", add_pooling_layer=False, output_loading_info=True
    )
    assert type(loaded) is BertModel
    assert not any(found.values())
    assert load_with_saved_head(tmp_path / "out").config.architectures == ["BertModel"]  # for ONNX
    card = (tmp_path / "out/README.md").read_text()
    assert (tmp_path / "out/1_Pooling/config.json").exists() == of_sentences
    use = "SentenceTransformer(" if of_sentences else "AutoModel.from_pretrained("
    assert use in card
