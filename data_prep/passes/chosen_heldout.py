"""What is held out where chance has held out nothing: some whole documents, or the ends of a few large ones.

A document is held out by chance, by its digest (bucket_files.py), so that a small corpus may have none, and nothing to
score a model on. Then the documents of the lowest digests are taken, which a larger --heldout-fraction would hold out
first. The choice depends on the set of documents alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

MIN_TOKENS = 4096
"""Held out at least: eight windows of 512 tokens. But never more than LARGEST_SHARE of a corpus."""
LARGEST_SHARE = 1 / 10
MAX_ENDS = 64
"""Ends of so many documents at most."""
MIN_END = 64
"""Tokens of an end. A corpus of which a tenth is less keeps all of them."""


def choose_heldout(
    parts: Iterable[tuple[np.ndarray, np.ndarray]], tokens: int, documents: int, fraction: float
) -> tuple[dict[bytes, int], int]:
    """Choose about `fraction` of a corpus.

    Args:
        parts: digests, uint64 (n, 2), and lengths with separator, int64 (n,), of the documents in parts.
        tokens: of all of them.
        documents: how many there are.
    Returns:
        Digest -> the first of the document's tokens that is held out, 0 where it is held out whole; how many tokens
        are held out, separators included.
    """
    target = int(min(max(math.ceil(fraction * tokens), MIN_TOKENS), tokens * LARGEST_SHARE))
    if target < MIN_END:
        return {}, 0
    whole = tokens / documents <= target
    chosen: list[tuple[int, int, int]] = []
    for digests, lengths in parts:
        fitting = np.flatnonzero(lengths <= target) if whole else np.arange(len(lengths))
        table = zip(digests[fitting].tolist(), lengths[fitting].tolist(), strict=True)
        chosen = _first(
            [*chosen, *((low, high, length) for (low, high), length in table)], target if whole else None
        )
    if whole:
        return {_key(low, high): 0 for low, high, _ in chosen}, sum(length for _, _, length in chosen)
    chosen = chosen[: target // MIN_END]
    end = target // len(chosen)
    ends = [(low, high, length, min(end, length // 2)) for low, high, length in chosen if length > 3]
    return {_key(low, high): length - size for low, high, length, size in ends}, sum(
        size for *_, size in ends
    )


def _first(documents: list[tuple[int, int, int]], target: int | None) -> list[tuple[int, int, int]]:
    """Those of the lowest digests: until they have `target` tokens, or MAX_ENDS of them."""
    documents.sort()
    if target is None:
        return documents[:MAX_ENDS]
    needed = int(np.searchsorted(np.cumsum([length for _, _, length in documents]), target)) + 1
    return documents[:needed]


def _key(low: int, high: int) -> bytes:
    return np.array([low, high], dtype=np.uint64).tobytes()


def left_for_training(
    pieces: Mapping[bytes, int], keys: np.ndarray, digests: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The keys and lengths of what is not held out by choice.

    Args:
        pieces: as `choose_heldout` gives them.
        keys, digests, lengths: uint64 (n,), uint64 (n, 2) and int64 (n,), of documents.
    Returns:
        keys and lengths (m,), m <= n.
    """
    lengths = lengths.copy()
    for index in chosen_rows(pieces, digests):
        cut = pieces[digests[index].tobytes()]
        lengths[index] = cut + 1 if cut else 0  # the part that stays gets a separator
    return keys[lengths > 0], lengths[lengths > 0]


def chosen_rows(pieces: Mapping[bytes, int], digests: np.ndarray) -> list[int]:
    """Where in `digests`, uint64 (n, 2), the documents of the pieces stand."""
    lows = np.array([int.from_bytes(digest[:8], "little") for digest in pieces], dtype=np.uint64)
    candidates = np.flatnonzero(np.isin(digests[:, 0], lows)).tolist()
    return [index for index in candidates if digests[index].tobytes() in pieces]
