"""launch/trim_vocabulary.py on tiny teachers of every kind of tokenizer: what it makes, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    ElectraModel,
    EsmTokenizer,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaTokenizer,
)

from data_prep import write_shards
from data_prep.shard_format.manifest import Manifest
from launch import trim_vocabulary
from tests.unit.models.test_families import MODELS, SIZES, rough
from train.errors import UserError
from train.export.trimming import load_as_saved, trim_model, trim_teacher
from train.models.encoder_config import read_config
from train.models.families import max_positions
from train.models.tokenizer_checks import check_vocabulary, folder_fingerprint

KEPT = (0, 1, 2, 3, 4, 9, 17, 18, 40, 63)
CASES: dict[str, Callable[[], PreTrainedModel]] = {
    **MODELS,
    "bert, untied": lambda: BertForMaskedLM(BertConfig(**SIZES, tie_word_embeddings=False)),
    "bert, as wide as its vocabulary": lambda: BertForMaskedLM(
        BertConfig(**{**SIZES, "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32})
    ),
    "bert, no head": lambda: BertModel(BertConfig(**SIZES)),
    "bert, fine-tuned": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
}


@pytest.mark.parametrize("kind", CASES)
def test_hidden_states_of_kept_tokens_are_equal_to_the_bit(kind: str) -> None:
    model = CASES[kind]().eval()
    rough(model)
    kept = np.array([index for index in KEPT if index < model.config.vocab_size])
    trimmed = trim_model(model, kept)
    assert trimmed.config.vocab_size == len(kept)
    ids = torch.randint(len(kept), (3, 12), generator=torch.Generator().manual_seed(0))
    before, after = (
        model(torch.from_numpy(kept)[ids], output_hidden_states=True),
        trimmed(ids, output_hidden_states=True),
    )
    for left, right in zip(before.hidden_states, after.hidden_states, strict=True):
        assert torch.equal(left, right)
    if type(model).__name__.endswith("ForMaskedLM"):
        torch.testing.assert_close(after.logits, before.logits[..., kept], rtol=0, atol=1e-5)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert (trimmed.get_output_embeddings().weight is trimmed.get_input_embeddings().weight) == tied


@pytest.mark.parametrize(
    ("architectures", "found"),
    [
        (["ElectraForMaskedLM"], ElectraForMaskedLM),
        (["ElectraForPreTraining"], ElectraModel),
        (None, ElectraModel),
    ],
)
def test_a_head_that_is_not_known_is_left_out(
    architectures: list[str] | None, found: type, tmp_path: Path
) -> None:
    kind = ElectraForMaskedLM if found is ElectraForMaskedLM else ElectraForPreTraining
    kind(ElectraConfig(**SIZES)).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    config.architectures = architectures
    assert type(load_as_saved(tmp_path, config)) is found


def test_ids_in_the_config_follow() -> None:
    model = MODELS["modernbert"]()
    model.config.update({"mask_token_id": 63, "bos_token_id": None, "eos_token_id": 9999})
    config = trim_model(model, np.array(KEPT)).config
    assert (config.pad_token_id, config.cls_token_id, config.mask_token_id) == (0, 2, 9)
    assert (config.bos_token_id, config.eos_token_id) == (None, 9999)  # no token of it


def trained(model: Any, trainer: Any, before: Any, documents: list[str]) -> Any:
    """A model of `tokenizers` that has learnt the documents and some Greek."""
    rng = Random(0)
    greek = ["".join(rng.choices("αβγδεζηθ", k=rng.randint(2, 5))) for _ in range(300)]
    model = Tokenizer(model)
    model.pre_tokenizer = before
    model.train_from_iterator([*documents, " ".join(greek)], trainer)
    return json.loads(model.to_str())["model"]


def bert_tokenizer(documents: list[str]) -> BertTokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    parts = trained(
        models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.BertPreTokenizer(), documents
    )
    return BertTokenizer(vocab=parts["vocab"])


def roberta_tokenizer(documents: list[str]) -> RobertaTokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    parts = trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False), documents)
    return RobertaTokenizer(vocab=parts["vocab"], merges=[tuple(pair) for pair in parts["merges"]])


def xlm_roberta_tokenizer(documents: list[str]) -> XLMRobertaTokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    parts = trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), documents)
    return XLMRobertaTokenizer(vocab=[tuple(entry) for entry in parts["vocab"]])


TEACHERS = {
    "bert, no head": (
        bert_tokenizer,
        lambda size: BertModel(BertConfig(**{**SIZES, "vocab_size": size}), add_pooling_layer=False),
    ),
    "roberta": (
        roberta_tokenizer,
        lambda size: RobertaForMaskedLM(RobertaConfig(**{**SIZES, "vocab_size": size})),
    ),
    "xlm-roberta": (
        xlm_roberta_tokenizer,  # its model has rows that no token has
        lambda size: XLMRobertaForMaskedLM(XLMRobertaConfig(**{**SIZES, "vocab_size": size + 3})),
    ),
}
BESIDE = (
    "README.md",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "2_Dense/model.safetensors",
)
LEFT_OUT = (
    "vocab.txt",
    "merges.txt",
    "sentencepiece.bpe.model",
    "tf_model.h5",
    "onnx/model.onnx",
    ".gitattributes",
)


def write(path: Path, documents: list[str], tokenizer: Path) -> str:
    """Shards of documents; where they lie."""
    path.mkdir()
    (path / "documents.txt").write_text("\n".join(documents))
    arguments = [str(path / "documents.txt"), "--txt-documents", "line", "--tokenizer", str(tokenizer)]
    options = ["--out", str(path / "shards"), "--heldout-fraction", "0.1", "--processes", "1"]
    assert write_shards.main([*arguments, *options]) == 0
    return str(path / "shards")


def weights_of(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_trimmed_teacher_is_a_teacher(
    kind: str, documents: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer, make_model = TEACHERS[kind]
    teacher, out = tmp_path / "teacher", tmp_path / "out"
    whole = make_tokenizer(documents)
    whole.save_pretrained(teacher)
    torch.manual_seed(0)
    make_model(len(whole)).save_pretrained(teacher)
    for name in (*BESIDE, *LEFT_OUT):
        (teacher / name).parent.mkdir(exist_ok=True)
        (teacher / name).write_text("{}")
    shards = write(tmp_path / "before", documents, teacher)
    capsys.readouterr()
    arguments = [str(teacher), "--shards", shards, "--coverage", "0.9", "--out", str(out)]
    assert trim_vocabulary.main(arguments) == 0
    assert {path for path in (*BESIDE, *LEFT_OUT) if (out / path).exists()} == set(BESIDE)
    said = capsys.readouterr().out
    assert weights_of(out) == weights_of(teacher)
    part = AutoTokenizer.from_pretrained(out)
    assert type(part) is type(whole)
    assert part.model_max_length == max_positions(read_config(out))
    assert f"{len(part)} of {len(whole) + 3 * (kind == 'xlm-roberta')} tokens are kept: 9" in said
    assert len(part) < len(whole) - 60
    for name, token in whole.special_tokens_map.items():
        assert getattr(part, name) == token
    mapped = 0
    for text in [*documents[:20], *documents[0].split()]:
        before, after = whole(text), part(text)
        tokens = whole.convert_ids_to_tokens(before["input_ids"])
        if set(tokens) <= part.get_vocab().keys():
            assert part.convert_ids_to_tokens(after["input_ids"]) == tokens
            mapped += 1
        assert part.unk_token_id not in after["input_ids"]
    assert mapped
    assert part.unk_token_id in part("\u03b1")["input_ids"] or kind == "roberta"
    manifest = Manifest.load(write(tmp_path / "after", documents, out))
    check_vocabulary(str(out), read_config(out), folder_fingerprint(str(out)), manifest.tokenizer)


REFUSED: dict[str, tuple[list[str], str]] = {
    "two sizes": (["--keep", "40", "--coverage", "0.9"], "not allowed with"),
    "no tokens": (["--keep", "0"], "--keep 0: give the number of tokens"),
    "too few": (
        ["--keep", "9"],
        r"--keep 9: special tokens and the characters .* are \d+ tokens; give that or more",
    ),
    "no share": (["--coverage", "0"], "--coverage 0.0: give a share above 0"),
    "more than all": (["--coverage", "1.5"], "--coverage 1.5: give a share .* at most 1"),
    "a folder of others": (["--out", "."], r"\. exists; give another folder or remove it first"),
    "no shards": (["--shards", "nowhere"], r"nowhere/manifest\.json does not exist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(
    case: str, teacher_folder: str, shards_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, message = REFUSED[case]
    arguments = [teacher_folder, "--shards", shards_folder, "--out", str(tmp_path / "out"), *options]
    with pytest.raises((UserError, SystemExit)) as refused:
        trim_vocabulary.main(arguments)
    assert re.search(message, f"{refused.value} {capsys.readouterr().err}")
    assert not list(tmp_path.iterdir())


def test_teachers_that_are_refused(
    teacher_folder: str, shards_folder: str, documents: list[str], tmp_path: Path
) -> None:
    def refused(teacher: str | Path, message: str, shards: str = shards_folder) -> None:
        with pytest.raises(UserError, match=message):
            trim_teacher(Path(teacher), shards, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(
        "somebody/model",
        r"there is no model folder somebody/model; give .*`hf download NAME --local-dir FOLDER`",
    )
    other = tmp_path / "other"
    shutil.copytree(teacher_folder, other)
    bert_tokenizer(documents).save_pretrained(other)
    refused(other, "other has another tokenizer than the shards")
    for path in other.glob("tokenizer*"):
        path.unlink()
    (other / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", "<mask>", "a"]))
    EsmTokenizer(str(other / "vocab.txt"), sep_token="<eos>").save_pretrained(other)
    refused(other, "other: EsmTokenizer is not a fast tokenizer")
    shards = write(
        tmp_path / "letters", [*documents, " ".join("abcdefghijklmnopqrstuvwxyz")], Path(teacher_folder)
    )
    refused(teacher_folder, r"all of its \d+ tokens would stay; give a lower --keep or --coverage", shards)
