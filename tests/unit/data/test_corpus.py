"""What a corpus is known by: digests of its manifest and of its token histogram."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.tiny_shards import with_histogram, write_tiny_shards
from train.config import Config
from train.config_sections.data import DataConfig
from train.data.corpus import read_corpus_digests
from train.distributed.consistency import start_up_facts


def test_another_histogram_is_another_corpus(tmp_path: Path) -> None:
    """With a digest in the manifest and, in older ones, without: ranks compare these, and a run that goes on."""
    manifest = write_tiny_shards(tmp_path, shards=1, documents=4)
    tokens = sum(shard.tokens for shard in manifest.splits["train"])
    config = Config(data=DataConfig(shards=str(tmp_path)))
    seen = []
    for first in (tokens, tokens - 1):
        counts = np.zeros(64, np.int64)
        counts[:2] = first, tokens - first
        with_histogram(tmp_path, manifest, counts)
        seen.append(read_corpus_digests(str(tmp_path)))
        replace(manifest, token_histogram_sha256=None).save(tmp_path)
        seen.append(read_corpus_digests(str(tmp_path)))
    assert list(seen[0]) == ["data.shards", "data.token_histogram"]
    assert len({digests["data.token_histogram"] for digests in seen}) == 4
    assert seen[1]["data.shards"] == seen[3]["data.shards"] != seen[0]["data.shards"]
    facts = [start_up_facts(config, digests) for digests in (seen[1], seen[3])]
    assert [name for name in facts[0] if facts[0][name] != facts[1][name]] == [
        f"data.token_histogram in {tmp_path}"
    ]
    (tmp_path / "histogram.npy").unlink()
    assert read_corpus_digests(str(tmp_path))["data.token_histogram"] == "unreadable"
    (tmp_path / "manifest.json").unlink()
    assert set(read_corpus_digests(str(tmp_path)).values()) == {"unreadable"}
