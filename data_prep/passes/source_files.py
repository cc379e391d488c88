"""What the files of the sources were when a job began, so that a later call knows whether they still are.

A file counts as unchanged where its size and modification time are the same, or, after a copy or a touch, its size and
its contents: all of them up to SAMPLES x SAMPLE bytes, and of a larger file that many samples, from its head to its
tail. What lies on the hub is not compared.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import StrictInt, StrictStr, TypeAdapter, ValidationError

from data_prep.shard_format.checks import first_problem
from data_prep.shard_format.errors import UserError
from data_prep.shard_format.files import read_json
from data_prep.sources.resolve import Source

SAMPLE = 1 << 16
SAMPLES = 64
RECORD_NAME = ".sources.json"
_THREADS = 8

Records = Mapping[str, Sequence[Any]]
"""Path -> bytes, modification time in ns, digest of the samples."""
_RECORDS: TypeAdapter[Records] = TypeAdapter(dict[str, tuple[StrictInt, StrictInt, StrictStr]])


@dataclass(frozen=True)
class Changes:
    """What became of the files since they were recorded."""

    changed: tuple[str, ...]
    """A line for each file that is another one now."""
    sampled: tuple[str, ...]
    """Files with another modification time of which samples alone were compared."""


def describe_files(sources: Sequence[Source]) -> dict[str, list[Any]]:
    """The records of all files, in the order of the sources."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(pool.map(_record, _paths(sources)))


def _record(path: str) -> tuple[str, list[Any]]:
    status = os.stat(path)
    return path, [status.st_size, status.st_mtime_ns, sampled_digest(path, status.st_size)]


def changed_files(before: Records, sources: Sequence[Source]) -> Changes:
    """Compare what is there now with what was recorded; a file is read only where its modification time is new."""
    recorded = {os.path.abspath(path): record for path, record in before.items()}
    changed, sampled = [], []
    for path in _paths(sources):
        record = recorded.pop(os.path.abspath(path), None)
        if record is None:
            changed.append(f"{path} is new")
            continue
        size, modified, digest = record
        status = os.stat(path)
        if status.st_size != size:
            changed.append(f"{path} has {status.st_size:,} bytes instead of {size:,}")
        elif status.st_mtime_ns != modified:
            if sampled_digest(path, size) != digest:
                changed.append(f"{path} has other contents")
            elif size > SAMPLE * SAMPLES:
                sampled.append(path)
    changed += [f"{path} is gone" for path in recorded]
    return Changes(tuple(changed), tuple(sampled))


def sampled_digest(path: str, size: int) -> str:
    """BLAKE2b over a file's samples, 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    last = max(0, size - SAMPLE)
    with open(path, "rb", buffering=0) as file:
        if size <= SAMPLE * SAMPLES:
            while data := file.read(1 << 20):
                digest.update(data)
        else:
            for number in range(SAMPLES):
                file.seek(last * number // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def _paths(sources: Sequence[Source]) -> Iterator[str]:
    """Every file once; of a folder saved by `datasets`, the files in it."""
    found: dict[str, None] = {}
    for source in sources:
        for file in source.files:
            if source.kind == "dataset":
                inside = (os.path.join(file.path, name) for name in sorted(os.listdir(file.path)))
                found.update(dict.fromkeys(path for path in inside if os.path.isfile(path)))
            elif source.kind != "hub":
                found[_plain(file.path)] = None
    return iter(found)


def _plain(path: str) -> str:
    """The path without "." and "..", of the same file: a link before ".." leads elsewhere."""
    plain = os.path.normpath(path)
    if ".." in path.split(os.sep) and os.path.realpath(plain) != os.path.realpath(path):
        return os.path.realpath(path)
    return plain


def kept_records(out: Path) -> Records | None:
    """What lies beside the shards; None in folders from before November 2026."""
    path = out / RECORD_NAME
    if not path.exists():
        return None
    remedy = f"remove it, and the sources of {out} are compared by name and size alone"
    return checked_records(read_json(path, remedy), path, remedy)


def checked_records(records: Any, path: Path, remedy: str) -> Records:
    """Records that were read from the file `path`; UserError where something has damaged them."""
    try:
        return _RECORDS.validate_python(records)
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({first_problem(error)}); {remedy}") from None
