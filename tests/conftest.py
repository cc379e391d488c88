"""Small real things the tests share: a tokenizer, documents, a teacher. No network, nothing pre-made."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from pathlib import Path

import hypothesis
import pytest

from data_prep import write_shards
from tests.distributed.pretraining import finish, small_settings, start, train

# Random examples are for people at work; a machine that judges a change must judge it twice alike.
hypothesis.settings.register_profile("same-every-time", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("same-every-time")


WORDS = ["the", "a", "model", "layer", "token", "student", "teacher", "learns", "reads", "writes"]
WORDS += ["small", "large", "fast", "slow", "shard", "batch"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """300 short documents, the same on every run."""
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(5, 120))) for _ in range(300)]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face folder with a WordPiece tokenizer of 64 entries."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*SPECIAL, *WORDS, *letters, *("##" + letter for letter in letters)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=512,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> str:
    """A random BERT of four layers and width 32 with an MLM head, as a Hugging Face folder."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    )
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def shards_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str, documents: list[str]
) -> str:
    """Shards of `documents`, made by the real command: several train shards and a held-out one."""
    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "documents.txt"
    text.write_text("\n".join(documents) + "\n")
    arguments = [str(text), "--txt-documents", "line", "--tokenizer", tokenizer_folder]
    arguments += ["--out", str(folder / "shards"), "--shard-tokens", "5000", "--heldout-fraction", "0.1"]
    assert write_shards.main([*arguments, "--processes", "1"]) == 0
    return str(folder / "shards")


@pytest.fixture(scope="session")
def settings(shards_folder: str, teacher_folder: str) -> list[str]:
    """Of a short distillation, for launch/pretrain.py."""
    return small_settings(shards_folder, teacher_folder)


@pytest.fixture(scope="session")
def undisturbed(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks under `deepspeed` from beginning to end, whose folder nobody changes."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, output = finish(start(settings, run_dir))
    assert code == 0, output
    return run_dir


@pytest.fixture(scope="session")
def on_one_rank(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on one rank."""
    run_dir = tmp_path_factory.mktemp("runs") / "single"
    train(settings, run_dir, ranks=1)
    return run_dir
