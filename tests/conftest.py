"""Small real things the tests share: a tokenizer, documents, a teacher. No network, nothing pre-made."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock

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


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills: once for all of pytest-xdist's workers."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    made = folder.with_suffix(".made")
    with FileLock(folder.with_suffix(".lock")):
        if not made.exists():
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face folder with a WordPiece tokenizer of 64 entries."""
    return str(made_once(tmp_path_factory, "tokenizer", write_tokenizer))


def write_tokenizer(folder: Path) -> None:
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
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> str:
    """A random BERT of four layers and width 32 with an MLM head, as a Hugging Face folder."""
    return str(made_once(tmp_path_factory, "teacher", lambda folder: write_teacher(folder, tokenizer_folder)))


def write_teacher(folder: Path, tokenizer_folder: str) -> None:
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
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def shards_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str, documents: list[str]
) -> str:
    """Shards of `documents`, made by the real command: several train shards and a held-out one."""

    def write(folder: Path) -> None:
        folder.mkdir()
        text = folder / "documents.txt"
        text.write_text("\n".join(documents) + "\n")
        arguments = [str(text), "--txt-documents", "line", "--tokenizer", tokenizer_folder]
        arguments += ["--out", str(folder / "shards"), "--shard-tokens", "5000", "--heldout-fraction", "0.1"]
        assert write_shards.main([*arguments, "--processes", "1"]) == 0

    return str(made_once(tmp_path_factory, "corpus", write) / "shards")


@pytest.fixture(scope="session")
def settings(shards_folder: str, teacher_folder: str) -> list[str]:
    """Of a short distillation, for launch/pretrain.py."""
    return small_settings(shards_folder, teacher_folder)


@pytest.fixture(scope="session")
def undisturbed(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks under `deepspeed` from beginning to end, whose folder nobody changes."""

    def run(run_dir: Path) -> None:
        code, output = finish(start(settings, run_dir))
        assert code == 0, output

    return made_once(tmp_path_factory, "undisturbed", run)


@pytest.fixture(scope="session")
def on_one_rank(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on one rank."""
    run_dir = tmp_path_factory.mktemp("runs") / "single"
    train(settings, run_dir, ranks=1)
    return run_dir
