"""A corpus, and the options of its shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def corpus(tmp_path: Path, documents: list[str]) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture
def good(corpus: Path, tokenizer_folder: str) -> list[Any]:
    return [corpus, "--tokenizer", tokenizer_folder, "--heldout-fraction", 0.1, "--shard-tokens", 3000]
