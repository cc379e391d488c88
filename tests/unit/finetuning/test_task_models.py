"""Encoders and their heads: families, what is missing or does not fit, metrics of predictions."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, GPT2Config

from tests.tiny_tasks import save_encoder
from tests.unit.finetuning.squad_tokenizers import wordpiece
from train.distributed.world import quiet_libraries
from train.errors import UserError
from train.finetuning.batches import check_pairs, encode
from train.finetuning.data.examples import Examples
from train.finetuning.metrics import metric_names, score_predictions
from train.finetuning.soft_labels import weights_digest
from train.finetuning.tasks import task_named
from train.models.encoder_config import longest_input, takes_token_types
from train.models.loading import check_encoder, load_finetuned, load_with_new_head
from train.models.tokenizer_checks import load_tokenizer

TWO = {"num_labels": 2}


def load(name: str, seed: int = 0) -> Any:
    return load_with_new_head(name, AutoModelForSequenceClassification, seed, TWO)


@pytest.fixture
def quiet() -> Iterator[None]:
    quiet_libraries()
    yield
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("models") / "bert")


@pytest.mark.parametrize(("family", "positions"), [("bert", 66), ("distilbert", 66), ("roberta", 64)])
def test_the_encoder_is_the_folders_and_the_head_is_the_seeds(
    tmp_path: Path, family: str, positions: int, capfd: pytest.CaptureFixture[str], quiet: None
) -> None:
    name = save_encoder(tmp_path, family)
    capfd.readouterr()
    first, again, other = load(name, 0), load(name, 0), load(name, 1)
    assert capfd.readouterr() == ("", "")
    saved = load_file(tmp_path / "model.safetensors")
    for key, weight in first.state_dict().items():
        if key in saved:
            assert torch.equal(weight, saved[key]), key
        assert torch.equal(weight, again.state_dict()[key])
    shared = set(saved) & set(first.state_dict())
    assert any("layer.1." in key for key in shared)
    heads = [
        key for key, weight in first.state_dict().items() if not torch.equal(weight, other.state_dict()[key])
    ]
    assert heads
    assert not set(heads) & shared
    config = check_encoder(name)
    assert longest_input(config, load_tokenizer(name, config)) == positions
    assert takes_token_types(first) == (family == "bert")
    ids = torch.randint(5, 30, (1, positions))
    first(ids)  # all positions can be used
    with pytest.raises((IndexError, RuntimeError)):
        first(torch.randint(5, 30, (1, positions + 1)))


def test_folders_that_are_no_encoder_are_refused(tmp_path: Path, bert: str) -> None:
    with pytest.raises(UserError, match="there is no model folder"):
        check_encoder(str(tmp_path / "none"))
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    for file, said in (("model.safetensors", "has no weights"), ("config.json", "has no config.json")):
        kept = (folder / file).read_bytes()
        (folder / file).unlink()
        with pytest.raises(UserError, match=said):
            check_encoder(str(folder))
        (folder / file).write_bytes(kept)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(UserError, match=r"model has no tokenizer \(tokenizer.json"):
        check_encoder(str(folder))
    wordpiece().save_pretrained(folder)
    check_encoder(str(folder))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        load_tokenizer(str(folder), check_encoder(str(folder)))
    GPT2Config().save_pretrained(folder)
    with pytest.raises(UserError, match="is a gpt2, which is no encoder of text; give a BERT"):
        check_encoder(str(folder))


def test_a_tokenizer_that_does_not_belong_to_the_model_is_refused(tmp_path: Path, bert: str) -> None:
    config = check_encoder(bert)
    config.vocab_size = 40
    with pytest.raises(UserError, match=r"its tokenizer goes up to token \d+, its model has 40 embeddings"):
        load_tokenizer(bert, config)
    check_pairs(bert, load_tokenizer(bert, check_encoder(bert)))
    with pytest.raises(
        UserError, match=r"with nothing between them; give its tokenizer.json a pair template"
    ):
        check_pairs("x", wordpiece(with_pairs=False))


def test_only_a_fine_tuned_model_is_a_teacher(tmp_path: Path, bert: str) -> None:
    with pytest.raises(
        UserError, match=r"is not fine-tuned: .*classifier.bias.* missing .*give OUT/TASK/seed-N"
    ):
        load_finetuned(bert, AutoModelForSequenceClassification)
    model = load(bert)
    model.save_pretrained(tmp_path)
    teacher = load_finetuned(str(tmp_path), AutoModelForSequenceClassification)
    assert torch.equal(teacher.classifier.weight, model.classifier.weight)
    assert not any(weight.requires_grad for weight in teacher.parameters())


def test_the_digest_is_of_contents(tmp_path: Path, bert: str) -> None:
    shutil.copytree(bert, tmp_path / "copy")
    before = weights_digest(bert)
    (tmp_path / "copy" / "scores.json").write_text("{}")
    assert weights_digest(str(tmp_path / "copy")) == before
    save_encoder(tmp_path / "copy", seed=1)
    assert weights_digest(str(tmp_path / "copy")) != before


def test_texts_are_cut_at_the_length_and_pairs_keep_both(bert: str) -> None:
    tokenizer = wordpiece()
    pair = Examples(["the a model"], ["small large fast slow shard batch"], np.zeros(1), ["x"])
    (whole,) = encode(tokenizer, pair, 20, token_types=True)
    assert (
        tokenizer.decode(whole["input_ids"])
        == "[CLS] the a model [SEP] small large fast slow shard batch [SEP]"
    )
    assert whole["token_type_ids"].tolist() == [0] * 5 + [1] * 7
    (cut,) = encode(tokenizer, pair, 8, token_types=False)
    assert tokenizer.decode(cut["input_ids"]) == "[CLS] the a [SEP] small large fast [SEP]"
    assert list(cut) == ["input_ids"]


def one_hot(classes: list[int], count: int = 2) -> np.ndarray:
    return np.eye(count, dtype=np.float32)[classes]


def scored(task: str, output: np.ndarray, labels: list[float]) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return score_predictions(task_named(task), {"dev": output}, {"dev": np.array(labels)})


def test_scores_worked_by_hand() -> None:
    """Two true and one false positive, one false and two true negatives."""
    output, labels = one_hot([1, 1, 1, 0, 0, 0]), [1.0, 1, 0, 1, 0, 0]
    assert scored("sst2", output, labels) == {
        "accuracy": pytest.approx(400 / 6),
        "score": pytest.approx(400 / 6),
    }
    assert scored("mrpc", output, labels)["f1"] == pytest.approx(200 / 3)
    assert scored("mrpc", output, labels)["score"] == pytest.approx((400 / 6 + 200 / 3) / 2)
    assert scored("cola", output, labels)["score"] == pytest.approx(100 * (2 * 2 - 1) / 9)
    found = scored("stsb", np.array([[1.0], [2.0], [4.0]]), [0.0, 1.0, 5.0])
    assert found["spearman"] == pytest.approx(100)
    assert found["pearson"] == pytest.approx(100 * 8 / (14 / 3 * 14) ** 0.5)
    assert found["score"] == pytest.approx((found["pearson"] + found["spearman"]) / 2)


def test_mnli_is_the_mean_of_both_sets() -> None:
    task = task_named("mnli")
    labels = {"matched": np.array([0, 1, 2, 0]), "mismatched": np.array([0, 1])}
    output = {"matched": one_hot([0, 1, 2, 1], 3), "mismatched": one_hot([0, 0], 3)}
    assert metric_names(task, labels) == ("accuracy_matched", "accuracy_mismatched")
    assert score_predictions(task, output, labels) == {
        "accuracy_matched": 75.0,
        "accuracy_mismatched": 50.0,
        "score": 62.5,
    }


def test_degenerate_predictions_score_0_without_a_warning() -> None:
    assert scored("cola", one_hot([1, 1, 1]), [1, 0, 1])["score"] == 0
    assert scored("cola", one_hot([1, 1]), [1, 1])["score"] == 0
    assert scored("mrpc", one_hot([0, 0]), [0, 0])["f1"] == 0
    assert scored("stsb", np.full((3, 1), 2.5), [0.0, 1.0, 5.0]) == {"pearson": 0, "spearman": 0, "score": 0}
    assert scored("stsb", np.array([[1.0], [2.0], [3.0]]), [2.0, 2.0, 2.0])["score"] == 0
    assert scored("stsb", np.array([[1.0]]), [2.0])["score"] == 0
