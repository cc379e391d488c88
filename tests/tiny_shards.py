"""Small shards for the tests of what reads them: random tokens, nothing from the tokenizer."""

from __future__ import annotations

import hashlib
import io
import random
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep.shard_format.blocks import write_shard
from data_prep.shard_format.manifest import Manifest, ShardInfo, token_dtype
from data_prep.shard_format.tokenizer_info import TokenizerInfo

SEP = 3
TOKENIZER = TokenizerInfo(
    "tiny", 64, pad_id=0, unk_id=1, cls_id=2, sep_id=SEP, mask_id=4, special_ids=(0, 1, 2, 3, 4)
)


def random_documents(seed: int, count: int, longest: int = 60, vocab_size: int = 64) -> list[np.ndarray]:
    """Documents of 1 to `longest` ordinary tokens, each followed by the separator."""
    uniform = random.Random(seed).random  # the same for ever, which numpy's generators do not promise

    def below(limit: int) -> int:
        return int(uniform() * limit)

    return [
        np.array(
            [*(5 + below(vocab_size - 5) for _ in range(1 + below(longest))), SEP], token_dtype(vocab_size)
        )
        for _ in range(count)
    ]


def shard_of(folder: Path, name: str, documents: list[np.ndarray]) -> ShardInfo:
    """Write one shard into `folder`; what the manifest says of it."""
    file = io.BytesIO()
    num_documents, num_tokens = write_shard(file, name.removesuffix(".tar"), documents)
    return put_file(folder, name, file.getvalue(), num_documents, num_tokens)


def put_file(folder: Path, name: str, content: bytes, documents: int, tokens: int) -> ShardInfo:
    (folder / name).write_bytes(content)
    return ShardInfo(name, len(content), hashlib.sha256(content).hexdigest(), documents, tokens)


def write_tiny_shards(
    folder: Path, shards: int = 4, heldout: int = 1, documents: int = 120, seed: int = 0
) -> Manifest:
    """A folder of uneven shards with its manifest; the same bytes for the same arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    uniform = random.Random(seed).random
    splits = {
        split: tuple(
            shard_of(
                folder,
                f"{split}-{index:06d}.tar",
                random_documents(
                    1000 * seed + index + 500 * (split == "heldout"), int(documents * (1 + uniform()) / 2)
                ),
            )
            for index in range(count)
        )
        for split, count in (("train", shards), ("heldout", heldout))
    }
    manifest = Manifest(TOKENIZER, splits, "histogram.npy")
    return with_histogram(folder, manifest, np.arange(TOKENIZER.vocab_size, dtype=np.int64) ** 2)


def with_histogram(folder: Path, manifest: Manifest, counts: np.ndarray) -> Manifest:
    """The manifest, saved, with these made-up counts of tokens beside it."""
    path = folder / manifest.token_histogram
    np.save(path, counts)
    manifest = replace(manifest, token_histogram_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    manifest.save(folder)
    return manifest
