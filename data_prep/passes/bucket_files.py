"""Bucket files: the tokenised documents of one chunk of work, sorted by the key that decides their place.

A bucket file is the journal, too: where it exists its chunk is done. Layout: 8 bytes with the length of a JSON
head, the head, then keys uint64 (n,), digests uint64 (n, 2), ends uint64 (n,), bands uint64 (n, b) and the tokens; b,
of the signatures of near-duplicates, stands in the head and is 0 where nobody looks for them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shard_format.files import new_file

HELDOUT_BIT = np.uint64(1) << np.uint64(63)


def document_keys(digests: np.ndarray, seed: int, heldout_fraction: float) -> np.ndarray:
    """Where documents go, from their digests: uint64 (n, 2) -> uint64 (n,).

    The highest bit says that a document is held out; it hangs on the digest alone, so that it stays when the
    seed changes or sources are added. The other 63 are a keyed hash that orders the documents at random:
    splitmix64's finaliser (Steele et al. 2014, doi:10.1145/2660193.2660195) over the digest and the seed.
    """
    low, high = digests[:, 0], digests[:, 1]
    key = mix(high ^ mix(np.array([seed], dtype=np.uint64))) >> np.uint64(1)
    threshold = int(heldout_fraction * 2.0**53)
    heldout = (low >> np.uint64(11)) < np.uint64(threshold)
    return np.where(heldout, key | HELDOUT_BIT, key)


def mix(value: np.ndarray) -> np.ndarray:
    """A random permutation of uint64."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@dataclass(frozen=True)
class Bucket:
    """An opened bucket file. The arrays are views of the file: nothing is read that is not used."""

    head: dict[str, Any]
    keys: np.ndarray
    digests: np.ndarray
    ends: np.ndarray
    bands: np.ndarray
    tokens: np.ndarray

    def between(self, low: int, high: int) -> slice:
        """The documents whose keys k are low <= k < high, where high may be 2**64."""
        start = int(np.searchsorted(self.keys, np.uint64(low)))
        if high >= 1 << 64:
            return slice(start, len(self.keys))
        return slice(start, int(np.searchsorted(self.keys, np.uint64(high))))


def write_bucket(
    path: Path,
    head: dict[str, Any],
    keys: np.ndarray,
    digests: np.ndarray,
    documents: list[np.ndarray],
    bands: np.ndarray | None = None,
) -> None:
    """Put a bucket file at `path` in one step.

    Args:
        keys: uint64 (n,), ascending.
        digests: uint64 (n, 2), ascending where keys are equal.
        documents: n token arrays.
        bands: uint64 (n, b), or None.
    """
    lengths = np.array([len(document) for document in documents], dtype=np.uint64)
    signed = {} if bands is None else {"bands": bands.shape[1]}
    dtype = documents[0].dtype if documents else np.dtype(np.uint16)
    text = json.dumps({**head, "documents": len(documents), "dtype": dtype.name, **signed}).encode()
    text += b" " * (-len(text) % 8)  # the arrays after it are aligned
    with new_file(path, binary=True) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.write(keys.tobytes())
        file.write(digests.tobytes())
        file.write(np.cumsum(lengths, dtype=np.uint64).tobytes())
        if bands is not None:
            file.write(bands.tobytes())
        for document in documents:
            file.write(document.data)


def read_head(path: str | os.PathLike[str]) -> dict[str, Any]:
    with open(path, "rb") as file:
        head: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return head


def open_bucket(path: str | os.PathLike[str]) -> Bucket:
    content = np.memmap(path, dtype=np.uint8, mode="r")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    head = json.loads(content[8:start].tobytes())
    count = head["documents"]
    num_bands = head.get("bands", 0)
    table = content[start : start + 32 * count].view(np.uint64)
    end = start + (32 + 8 * num_bands) * count
    return Bucket(
        head=head,
        keys=table[:count],
        digests=table[count : 3 * count].reshape(count, 2),
        ends=table[3 * count :],
        bands=content[start + 32 * count : end].view(np.uint64).reshape(count, num_bands),
        tokens=content[end:].view(head["dtype"]),
    )
