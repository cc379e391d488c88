"""Documents that are nearly those of others, by MinHash; which ones depends on the set of documents alone.

A document's signature is 112 minima of hashes over its runs of five tokens, in 14 bands of 8 (Broder 1997; the numbers
are those of FineWeb, Penedo et al. 2024, arXiv:2406.17557, section 3). Where two documents agree in a band, the one of
the higher key is dropped: of a held-out and a training document the held-out one. Two that share 60, 70, 80 and 90 % of
their runs agree in a band with a chance of 21, 56, 92 and 99.9 %.

Memory: signatures lie in the bucket files, 112 bytes for each document; whoever looks for equal bands, one at a time,
holds about 60 bytes for each document of the corpus: 6 GB for a hundred million.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.passes.bucket_files import Bucket, mix, open_bucket
from data_prep.shard_format.errors import UserError
from data_prep.shard_format.files import write_array
from data_prep.shard_format.required_packages import install_command

RUN = 5
BANDS, ROWS = 14, 8
_TOGETHER = 4096
"""Runs hashed at a time, a kilobyte each."""


@dataclass(frozen=True)
class NearDuplicates:
    """What was found: `path` holds a bool for each document of the bucket files, in their order."""

    path: Path
    documents: int
    copies: int
    """Further copies of these, which are duplicates as well."""


class Signatures:
    """Makes signatures; UserError where datasketch is not installed."""

    def __init__(self) -> None:
        try:
            from datasketch import MinHash
        except ImportError as error:
            raise UserError(
                f"--drop-near-duplicates needs the package datasketch, which is not installed ({error}): "
                f"{install_command('sources')}"
            ) from None
        self._minima: Any = MinHash(num_perm=BANDS * ROWS, seed=1, hashfunc=int)

    def bands(self, tokens: np.ndarray) -> np.ndarray:
        """uint64 (BANDS,) of a document's tokens, without the separator."""
        self._minima.clear()
        runs = _runs(tokens)
        for start in range(0, len(runs), _TOGETHER):
            self._minima.update_batch(runs[start : start + _TOGETHER].tolist())
        rows = self._minima.hashvalues.astype(np.uint64).reshape(BANDS, ROWS)
        found = np.zeros(BANDS, dtype=np.uint64)
        for row in rows.T:
            found = mix(found ^ row)
        return found


def _runs(tokens: np.ndarray) -> np.ndarray:
    """The different hashes of all runs of RUN tokens, of 32 bits; of a shorter document the one of all its tokens."""
    values = tokens.astype(np.uint64)
    length = min(RUN, len(values))
    hashes = np.zeros(len(values) - length + 1, dtype=np.uint64)
    for place in range(length):
        hashes = mix(hashes ^ values[place : len(values) - length + 1 + place])
    return np.unique(hashes >> np.uint64(32))


def near_duplicates(keys: np.ndarray, bands: Iterable[np.ndarray]) -> np.ndarray:
    """Which documents agree in a band with one of a lower key.

    Args:
        keys: uint64 (n,), equal for copies of a document.
        bands: of each band its values, uint64 (n,); read one after the other.
    Returns:
        bool (n,), equal for copies.
    """
    found = np.zeros(len(keys), dtype=bool)
    for values in bands:
        order = np.lexsort((keys, values))
        ordered = values[order]
        starts = np.ones(len(order), dtype=bool)
        starts[1:] = ordered[1:] != ordered[:-1]
        first = np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))
        found[order[keys[order] != keys[order[first]]]] = True
    return found


def find_near_duplicates(paths: Sequence[Path], out: Path) -> NearDuplicates:
    """Look through all bucket files, and write what was found to `out`; on rank 0."""

    def values_of(band: int) -> np.ndarray:
        return _of_all(paths, lambda bucket: bucket.bands[:, band])

    keys = _of_all(paths, lambda bucket: bucket.keys)
    dropped = near_duplicates(keys, map(values_of, range(BANDS)))
    write_array(out, dropped)
    documents = len(np.unique(keys[dropped]))
    return NearDuplicates(out, documents, int(dropped.sum()) - documents)


def _of_all(paths: Sequence[Path], column: Callable[[Bucket], np.ndarray]) -> np.ndarray:
    """uint64 of all bucket files, of which there may be none, one after the other.

    Copies: an open bucket keeps its file open, and there may be thousands.
    """
    none = np.zeros(0, dtype=np.uint64)
    return np.concatenate([none, *(np.array(column(open_bucket(path))) for path in paths)])


def dropped_masks(found: NearDuplicates | None, counts: Sequence[int]) -> list[np.ndarray]:
    """For each bucket file, of so many documents, a bool for each of them, True where it is dropped."""
    if found is None:
        return [np.zeros(count, dtype=bool) for count in counts]
    ends = np.cumsum(counts)
    return np.split(np.load(found.path, mmap_mode="r"), ends[:-1])
