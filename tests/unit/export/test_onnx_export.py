"""launch/export.py --onnx: files that ONNX Runtime reads as torch reads the model, named as optimum names them."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from launch.export import main
from train.export import onnx_export
from train.models.loading import load_masked_lm, load_with_saved_head
from train.models.students import make_student

onnxruntime = pytest.importorskip("onnxruntime")
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def made(kind: str, teacher_folder: str) -> PreTrainedModel:
    """A small model of each head, its random weights large enough that outputs differ from token to token."""
    torch.manual_seed(1)
    if kind == "student":
        return make_student(load_masked_lm(teacher_folder))
    if kind == "classifier":
        settings = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "num_labels": 3}
        config = DistilBertConfig(
            vocab_size=72, max_position_embeddings=64, initializer_range=0.3, **settings
        )
        return DistilBertForSequenceClassification(config)
    if kind == "regression":
        config = DistilBertConfig(vocab_size=72, dim=32, n_layers=1, n_heads=4, hidden_dim=64, num_labels=1)
        return DistilBertForSequenceClassification(config)
    if kind == "roberta":  # its positions begin after the padding's id, and padding has none
        return RobertaForMaskedLM(
            RobertaConfig(vocab_size=72, max_position_embeddings=40, type_vocab_size=1, **BERT)
        )
    assert kind == "span"
    return BertForQuestionAnswering(BertConfig(vocab_size=72, max_position_embeddings=64, **BERT))


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, teacher_folder: str, tokenizer_folder: str
) -> dict[str, Path]:
    """Kind of model -> its Hugging Face folder `model`, exported to `out` beside it."""
    found = {}
    for kind in ("teacher", "student", "classifier", "regression", "roberta", "span"):
        folder = tmp_path_factory.mktemp(kind)
        if kind == "teacher":
            shutil.copytree(teacher_folder, folder / "model")
        else:
            made(kind, teacher_folder).save_pretrained(folder / "model")
            AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder / "model")
        (folder / "model" / "README.md").write_text(f"The card of a {kind}.")
        assert main([str(folder / "model"), str(folder / "out"), "--onnx", "--int8"]) == 0
        found[kind] = folder
    return found


NAMES: dict[str, tuple[list[str], dict[str, list[Any]]]] = {
    "teacher": (["input_ids", "attention_mask", "token_type_ids"], {"logits": ["batch_size", "sequence_length"]}),
    "student": (["input_ids", "attention_mask"], {"logits": ["batch_size", "sequence_length"]}),
    "classifier": (["input_ids", "attention_mask"], {"logits": ["batch_size", 3]}),
    "regression": (["input_ids", "attention_mask"], {"logits": ["batch_size", 1]}),
    "roberta": (["input_ids", "attention_mask"], {"logits": ["batch_size", "sequence_length"]}),
    "span": (
        ["input_ids", "attention_mask", "token_type_ids"],
        {"start_logits": ["batch_size", "sequence_length"], "end_logits": ["batch_size", "sequence_length"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_names_axes_and_outputs(kind: str, exported: dict[str, Path]) -> None:
    """Against torch directly, at shapes that the export itself does not try."""
    inputs, outputs = NAMES[kind]
    session = onnxruntime.InferenceSession(str(exported[kind] / "out" / "model.onnx"))
    assert [value.name for value in session.get_inputs()] == inputs
    assert all(value.shape == ["batch_size", "sequence_length"] for value in session.get_inputs())
    assert {value.name: value.shape[:2] for value in session.get_outputs()} == outputs
    model = load_with_saved_head(exported[kind] / "model")
    for batch, length in ((4, 9), (2, 30)):
        ids = torch.randint(5, 72, (batch, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        for row in range(batch):
            mask[row, length - row :] = 0
        ids[mask == 0] = model.config.pad_token_id or 0
        given = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in inputs:
            given["token_type_ids"] = (torch.arange(length) > 4).long().repeat(batch, 1)
        with torch.no_grad():
            expected = model(**given)
        found = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        for name, values in zip(outputs, found, strict=True):
            reference = expected[name].numpy()
            assert values.shape == reference.shape
            if "sequence_length" in outputs[name]:
                values, reference = values[mask.bool().numpy()], reference[mask.bool().numpy()]
            assert np.ptp(reference) > 1e-3
            np.testing.assert_allclose(values, reference, atol=1e-5)


@pytest.mark.parametrize("kind", ["student", "classifier", "span"])
def test_int8_is_smaller_and_near(kind: str, exported: dict[str, Path]) -> None:
    out = exported[kind] / "out"
    assert (out / "model_int8.onnx").stat().st_size < 0.9 * (out / "model.onnx").stat().st_size
    ids = np.random.default_rng(0).integers(5, 72, (2, 12))
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    full, small = (
        onnxruntime.InferenceSession(str(out / name)).run(
            None, {name: given[name] for name in NAMES[kind][0]}
        )[0]
        for name in ("model.onnx", "model_int8.onnx")
    )
    assert 0 < np.abs(full - small).max() < 0.5 * full.std() + 0.01


def test_folder_is_what_a_runtime_expects(exported: dict[str, Path]) -> None:
    out = exported["classifier"] / "out"
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} < {path.name for path in out.iterdir()}
    assert (out / "README.md").read_text() == "The card of a classifier."
    assert (
        AutoTokenizer.from_pretrained(out).model_max_length == 64
    )  # of the model; the tokenizer came with 512
    assert not list(exported["classifier"].glob(".*"))
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_tied_embedding_stands_in_the_file_once(exported: dict[str, Path]) -> None:
    model = load_with_saved_head(exported["student"] / "model")
    weights = 4 * sum(tensor.numel() for tensor in model.parameters())
    embedding = 4 * model.get_input_embeddings().weight.numel()
    onnx = importlib.import_module("onnx")
    stored = onnx.load(str(exported["student"] / "out" / "model.onnx")).graph.initializer
    assert sum(len(tensor.raw_data) for tensor in stored) < weights + embedding / 2


def test_command_says_the_differences(
    exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the student reads the shard\nthe teacher learns fast\n\n")
    words = [str(exported["classifier"] / "model"), str(tmp_path / "o"), "--onnx", "--int8"]
    assert main([*words, "--texts", str(texts)]) == 0
    said = capsys.readouterr().out
    assert "text-classification: input_ids, attention_mask -> logits" in said
    assert "beside torch on 5 shapes up to 64 tokens, with and without padding" in said
    assert "beside torch on 2 sentences: outputs differ by" in said
    assert "the first choice is the same in 100.0%" in said


def test_regression_has_no_first_choice(
    exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(exported["regression"] / "model"), str(tmp_path / "out"), "--onnx"])
    assert "first choice" not in capsys.readouterr().out


def test_outputs_that_are_not_torchs_are_refused(
    exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = DistilBertForSequenceClassification(
        load_with_saved_head(exported["classifier"] / "model").config
    ).eval()
    right = onnx_export.trace
    monkeypatch.setattr(onnx_export, "trace", lambda model, path: right(other, path))
    with pytest.raises(
        ValueError, match=r"the ONNX file's outputs differ from torch's by .* nothing was written"
    ):
        main([str(exported["classifier"] / "model"), str(tmp_path / "out"), "--onnx"])
    assert not list(tmp_path.iterdir())


def test_a_file_of_fixed_length_is_refused(
    exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "SEQUENCE", "batch_size")  # names clash: no axis of its own
    right = torch.onnx.export

    def fixed(*words: Any, dynamic_axes: Any, **named: Any) -> Any:
        return right(*words, **named)

    monkeypatch.setattr(torch.onnx, "export", fixed)
    with pytest.raises(ValueError, match=r"ONNX Runtime cannot run the file at 1 x 1 tokens"):
        main([str(exported["classifier"] / "model"), str(tmp_path / "out"), "--onnx"])


def test_missing_packages_name_the_command(
    exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else right(name, *rest)
    )
    with pytest.raises(ValueError, match=r"needs onnxruntime, .*pip install -r \S+/requirements-onnx\.txt$"):
        main([str(exported["classifier"] / "model"), str(tmp_path / "out"), "--onnx"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--int8"], "--int8 quantises the ONNX file: give --onnx too"),
        (["--onnx", "--texts", "t"], "--texts is what int8 is measured on"),
        ([], "is a Hugging Face folder already; --onnx writes it as ONNX"),
    ],
)
def test_options_without_effect(
    words: list[str], message: str, exported: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        main([str(exported["classifier"] / "model"), str(tmp_path / "out"), *words])
