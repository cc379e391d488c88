"""Is the content of a manifest.json what its writer makes? A manifest is input from outside.

It names files that end up in paths and URLs, counts that decide how much memory is taken, and ids
that index tables: everything is checked once, where it is read.
"""

from __future__ import annotations

import re
from typing import Any

from data_prep.shard_format.errors import UserError

_REMEDY = "make the shards again with data_prep/write_shards.py"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*")
# Sums of counts stay within int64, and JSON readers in other languages keep them exactly.
_LARGEST_COUNT = 2**53
# Token ids travel as int32.
_LARGEST_VOCABULARY = 2**31 - 1
_TOKENS = ("pad_id", "unk_id", "cls_id", "sep_id", "mask_id")


def check_file_name(name: object) -> None:
    """UserError unless `name` may be put behind a folder or a URL without harm."""
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise UserError(
            f"the shards' manifest names {name!r}, which is not a plain file name: only letters, digits and "
            f"_ . + = - may stand in it; {_REMEDY}"
        )


def check_content(content: dict[str, Any], splits: tuple[str, ...]) -> None:
    """Refuse a manifest, as read from JSON, whose fields are not what Manifest documents.

    Raises:
        UserError: names the field, its value and what it must be.
        KeyError, TypeError: a part is missing or has another structure.
    """
    check_file_name(content["token_histogram"])
    _check_tokenizer(content["tokenizer"])
    for split in splits:
        for index, shard in enumerate(content["splits"][split]):
            _check_shard(f"splits.{split}[{index}]", shard)
    _require("sources", content["sources"], list, "a list")
    for key in ("options", "skipped"):
        _require(key, content[key], dict, "a table")
    for reason, count in content["skipped"].items():
        _check_whole(f"skipped.{reason}", count, 0, _LARGEST_COUNT)


def _check_shard(place: str, shard: dict[str, Any]) -> None:
    for key in ("bytes", "documents", "tokens"):
        _check_whole(f"{place}.{key}", shard[key], 0, _LARGEST_COUNT)
    if shard["documents"] > shard["tokens"]:
        _refuse(f"{place}.documents", shard["documents"], f"at most its {shard['tokens']} tokens")
    if not isinstance(shard["sha256"], str) or not re.fullmatch("[0-9a-f]{64}", shard["sha256"]):
        _refuse(f"{place}.sha256", shard["sha256"], "64 hexadecimal digits")
    check_file_name(shard["name"])


def _check_tokenizer(tokenizer: dict[str, Any]) -> None:
    _require("tokenizer.fingerprint", tokenizer["fingerprint"], str, "a text")
    size, special = tokenizer["vocab_size"], tokenizer["special_ids"]
    _check_whole("tokenizer.vocab_size", size, 1, _LARGEST_VOCABULARY)
    _require("tokenizer.special_ids", special, list, "a list")
    for index, token in enumerate(special):
        _check_whole(f"tokenizer.special_ids[{index}]", token, 0, size - 1)
    if sorted(set(special)) != special or len(special) >= size:
        _refuse("tokenizer.special_ids", special, f"ascending, and fewer than the {size} of the vocabulary")
    for key in _TOKENS:
        _check_whole(f"tokenizer.{key}", tokenizer[key], 0, size - 1)
        if tokenizer[key] not in special:
            _refuse(f"tokenizer.{key}", tokenizer[key], "one of special_ids")


def _check_whole(place: str, value: object, least: int, most: int) -> None:
    # A bool is an int to Python.
    if type(value) is not int or not least <= value <= most:
        _refuse(place, value, f"a whole number from {least} to {most}")


def _require(place: str, value: object, kind: type, words: str) -> None:
    if not isinstance(value, kind):
        _refuse(place, value, words)


def _refuse(place: str, value: object, words: str) -> None:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    raise UserError(f"the shards' manifest has {place} = {shown}: it must be {words}; {_REMEDY}")
