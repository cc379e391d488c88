"""The canonical text of a manifest: what its digest is taken over, and what `save` writes.

It is json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True) without the fields that older manifests do
not have where they are None. A manifest may name a million shards, for which that takes 13 s: their objects, of which
there are two kinds of value alone, are written by a template instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
from collections.abc import Iterator, Sequence
from typing import Any

LATER_FIELDS = ("token_histogram_sha256",)
"""Not there in the first manifests, whose digests stay."""
# Nested keys stand further to the right, and a line break within a string is escaped.
_SPLITS = '\n "splits": null,\n'


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
    # Their texts are plain file names and hex digits (shard_format/checks.py), which JSON escapes nothing of.
    objects = ",\n".join(
        [
            f'   {{\n    "bytes": {shard.bytes},\n    "documents": {shard.documents},\n    "name": "{shard.name}",\n'
            f'    "sha256": "{shard.sha256}",\n    "tokens": {shard.tokens}\n   }}'
            for shard in shards
        ]
    )
    return f"[\n{objects}\n  ]"


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
