"""A manifest from outside: every field is checked before anything is done with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.shard_format.manifest import Manifest, ShardInfo, TokenizerInfo

TOKENIZER = TokenizerInfo("f" * 64, 64, 0, 1, 2, 3, 4, (0, 1, 2, 3, 4))
SHARD = ShardInfo("train-000000.tar", 10240, "0" * 64, 3, 500)
MANIFEST = Manifest(TOKENIZER, {"train": (SHARD,), "heldout": ()}, "counts.npy", skipped={"duplicates": 1})


def content_with(path: str, value: Any) -> dict[str, Any]:
    """The manifest as JSON has it, with the field at `path` (keys and indices) exchanged."""
    content = json.loads(MANIFEST.to_json())
    *parents, last = (int(word) if word.isdigit() else word for word in path.split("."))
    at = content
    for word in parents:
        at = at[word]
    at[last] = value
    return content


@pytest.mark.parametrize(
    "name",
    ["counts.npy;touch pwned", "$(id).npy", "a b.npy", "../x.npy", ".x.npy", "-rf", "", "a/b", "x\n", 7],
)
@pytest.mark.parametrize("field", ["token_histogram", "splits.train.0.name"])
def test_a_name_that_a_shell_or_a_path_could_read_otherwise_is_refused(field: str, name: Any) -> None:
    with pytest.raises(ValueError, match=r"names .*, which is not a plain file name: only letters, digits"):
        Manifest.from_dict(content_with(field, name))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("splits.train.0.tokens", -1, r"splits\.train\[0\]\.tokens = -1: it must be a whole number from 0 to"),
        ("splits.train.0.tokens", "500", "tokens = '500': it must be a whole number"),
        ("splits.train.0.tokens", 10**30, "it must be a whole number"),
        ("splits.train.0.bytes", 1.5, r"bytes = 1\.5: it must be a whole number"),
        ("splits.train.0.documents", True, "documents = True: it must be a whole number"),
        ("splits.train.0.documents", 501, "documents = 501: it must be at most its 500 tokens"),
        ("splits.train.0.sha256", "0" * 63, "sha256 = '0+': it must be 64 hexadecimal digits"),
        ("splits.train.0.sha256", "../" * 21 + "x", "it must be 64 hexadecimal digits"),
        ("splits.train.0.sha256", None, "it must be 64 hexadecimal digits"),
        ("tokenizer.vocab_size", 0, "vocab_size = 0: it must be a whole number from 1 to 2147483647"),
        ("tokenizer.vocab_size", 2**40, "vocab_size = .*: it must be a whole number"),
        ("tokenizer.vocab_size", 5, r"special_ids = \[0, 1, 2, 3, 4\]: it must be ascending, and fewer than the 5"),
        ("tokenizer.special_ids", [0, 1, 2, 3, 64], r"special_ids\[4\] = 64: it must be a whole number from 0 to 63"),
        ("tokenizer.special_ids", [4, 3, 2, 1, 0], "it must be ascending"),
        ("tokenizer.special_ids", [0, 1, 2, 4], "sep_id = 3: it must be one of special_ids"),
        ("tokenizer.special_ids", "01234", "special_ids = '01234': it must be a list"),
        ("tokenizer.mask_id", -1, "mask_id = -1: it must be a whole number from 0 to 63"),
        ("tokenizer.cls_id", None, "cls_id = None: it must be a whole number"),
        ("tokenizer.fingerprint", 7, "fingerprint = 7: it must be a text"),
        ("skipped", ["x"], r"skipped = \['x'\]: it must be a table"),
        ("skipped", {"short": -1}, r"skipped\.short = -1: it must be"),
        ("options", None, "options = None: it must be a table"),
        ("sources", 3, "sources = 3: it must be a list"),
        ("splits.train", 3, "is not a manifest of shards"),
        ("splits.train.0", {"name": "x.tar"}, "is not a manifest of shards"),
        ("splits.train.0.more", 1, "is not a manifest of shards"),
        ("tokenizer", [], "is not a manifest of shards"),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_is_refused_by_name(
    tmp_path: Path, field: str, value: Any, message: str
) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(content_with(field, value)))
    with pytest.raises(ValueError, match=message):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "text", [pytest.param("[" * 100_000, id="deep"), "[]", "3", "null", '"x"', "{}", '{"version": 1}']
)
def test_other_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="is not a manifest of shards"):
        Manifest.load(tmp_path)
