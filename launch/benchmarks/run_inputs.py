"""What a run needs and nobody downloads: a teacher of random weights, and shards of random tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from data_prep.shard_format.manifest import TOKENIZER_FOLDER
from data_prep.shard_format.tokenizer_info import tokenizer_info
from launch.benchmarks.loader import random_shards

ALONE = ("kd_weight=0", "mlm_weight=0", "cosine_weight=0", "relation_weight=1")
OBJECTIVES = {
    "triple": [],
    "masked": ["--objective.kd_positions=masked"],
    "relation": [f"--objective.{setting}" for setting in ALONE],
}
"""Settings of launch/pretrain.py by the objectives' names."""
SPECIAL = {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}


def make_inputs(folder: Path, config: BertConfig | None = None, tokens: int = 8_000_000) -> tuple[Path, Path]:
    """A BERT (None: BERT-base) with a tokenizer of its size, and shards for it.

    Returns:
        The folders of the two.
    """
    folder.mkdir(parents=True)
    config = config or BertConfig()
    teacher, shards = folder / "teacher", folder / "shards"
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(teacher)
    names = {number: f"[{name.upper()}]" for name, number in SPECIAL.items()}
    pieces = {names.get(number, f"w{number}"): number for number in range(config.vocab_size)}
    backend = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {f"{name}_token": f"[{name.upper()}]" for name in SPECIAL}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **special)
    tokenizer.save_pretrained(teacher)
    random_shards(shards, tokenizer_info(tokenizer), shards=2, tokens=tokens // 2)
    tokenizer.save_pretrained(shards / TOKENIZER_FOLDER)
    return teacher, shards
