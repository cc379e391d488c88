"""The canonical text of a manifest: what its digest is taken over, and what `save` writes.

It is json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True) without the fields that older manifests do
not have where they are None. A manifest may name a million shards, for which that takes 13 s: their objects, of which
there are two kinds of value alone, are written by a template instead, and read by the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.shard_format.checks import FILE_NAME

LATER_FIELDS = ("token_histogram_sha256",)
"""Not there in the first manifests, whose digests stay."""
# Nested keys stand further to the right, and a line break within a string is escaped.
_SPLITS = '\n "splits": null,\n'
# Their texts are plain file names and hex digits (shard_format/checks.py), which JSON escapes nothing of.
_SHARD = '   {\n    "bytes": %s,\n    "documents": %s,\n    "name": "%s",\n    "sha256": "%s",\n    "tokens": %s\n   }'
_SHARD_END = b"\n   }"
_PIECE = 1 << 20
_COUNT = "(0|[1-9][0-9]{0,14})"  # some valid counts have a digit more
_SHARD_TEXT = re.compile(
    re.escape(_SHARD) % (_COUNT, _COUNT, f"({FILE_NAME.pattern})", "([0-9a-f]{64})", _COUNT)
)


def canonical_json(manifest: Any) -> str:
    """The text of a Manifest: sorted keys, ASCII, a newline at the end."""
    content = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    splits = content.pop("splits")
    for name in LATER_FIELDS:
        if content[name] is None:
            del content[name]
    content["tokenizer"] = dataclasses.asdict(content["tokenizer"])
    head, tail = (json.dumps({**content, "splits": None}, indent=1, sort_keys=True) + "\n").split(_SPLITS)
    lists = ",".join(f"\n  {json.dumps(name)}: {_shards(splits[name])}" for name in sorted(splits))
    return f'{head}\n "splits": {{{lists}\n }},\n{tail}'


def _shards(shards: Sequence[Any]) -> str:
    if not shards:
        return "[]"
    objects = ",\n".join(
        [_SHARD % (each.bytes, each.documents, each.name, each.sha256, each.tokens) for each in shards]
    )
    return f"[\n{objects}\n  ]"


def split_shards(data: bytearray) -> Iterator[tuple[str, list[list[str]]]]:
    """A canonical text, in pieces, with a 0 in place of every shard; the columns of each piece's shards.

    Columns: bytes, documents, name, sha256, tokens. Pieces end where shards do, and are small, since the memory that
    the fields of a million take at once costs a second.
    """
    start = 0
    while start < len(data):
        end = data.find(_SHARD_END, start + _PIECE)
        end = len(data) if end < 0 else end + len(_SHARD_END)
        parts = _SHARD_TEXT.split(data[start:end].decode("ascii", "replace"))
        yield "0".join(parts[::6]), [parts[column::6] for column in range(1, 6)]
        start = end


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For making millions of objects, none of them in cycles: looking for garbage would double the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
