"""Which documents go into which shard: pure arithmetic over keys, digests and lengths.

Documents are in the order of their keys, which are random but depend on nothing except the document and the
seed; equal documents are neighbours in it. A shard is a range of keys. So a shard's documents, and their
order, depend on the set of documents alone, and duplicates are found without a table of all documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from data_prep.passes.bucket_files import HELDOUT_BIT
from data_prep.passes.chosen_heldout import choose_heldout, left_for_training

MIN_SHARDS = 8
MIN_SHARD_TOKENS = 2048
TRAIN_END = 1 << 63
_END = {"train": TRAIN_END, "heldout": 1 << 64}
_START = {"train": 0, "heldout": 1 << 63}

Documents = tuple[np.ndarray, np.ndarray, np.ndarray]
"""keys uint64 (n,), digests uint64 (n, 2), tokens with separator int64 (n,), in any order."""


@dataclass(frozen=True)
class KeyRange:
    """Of one source the documents whose keys k are low <= k < high, for the `copy`-th time."""

    source: int
    copy: int
    low: int
    high: int


@dataclass(frozen=True)
class ShardPlan:
    """The documents whose keys k are low <= k < high."""

    name: str
    split: str
    low: int
    high: int
    ranges: tuple[KeyRange, ...] = ()
    """Of a mixture (data_prep/passes/mixture.py): these alone."""


@dataclass(frozen=True)
class Share:
    """What one source of a mixture gives to the training shards."""

    weight: float
    """Of 1."""
    own_tokens: int
    """What it has, each document once, without what is held out."""
    tokens: int
    documents: int
    unused: int
    """Documents that are in no shard."""

    @property
    def epochs(self) -> float:
        return self.tokens / self.own_tokens


@dataclass(frozen=True)
class Plan:
    shards: tuple[ShardPlan, ...]
    documents: int
    tokens: int
    duplicates: int
    pieces: Mapping[bytes, int] = field(default_factory=dict)
    """What is held out by choice (data_prep/passes/chosen_heldout.py); empty where chance has held out documents."""
    shares: tuple[Share, ...] = ()
    """Of a mixture, what each source gives."""


def order_and_deduplicate(keys: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Indices of the documents to keep, in the order of the shards.

    Args:
        keys: uint64 (n,), a function of the digest and the seed.
        digests: uint64 (n, 2).
    """
    order = np.lexsort((digests[:, 1], digests[:, 0], keys))
    ordered = digests[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order[first]


def num_shards(tokens: int, shard_tokens: int, at_least: int) -> int:
    """As many as make `shard_tokens` tokens each; `at_least` so many where each still gets a few windows."""
    if tokens == 0:
        return 0
    return max(-(-tokens // shard_tokens), min(at_least, max(1, tokens // MIN_SHARD_TOKENS)))


def plan_shards(
    read: Callable[[], Iterable[Documents]], shard_tokens: int, heldout_fraction: float = 0.0
) -> Plan:
    """Cut the documents into shards of equal size, to within one document.

    Args:
        read: gives the documents in parts, part by part in ascending ranges of keys; called twice or three times.
        shard_tokens: tokens per shard, the separators included.
        heldout_fraction: above 0, something is held out even where no document's key says so.
    """
    tokens = {"train": 0, "heldout": 0}
    read_documents = kept_documents = 0
    for part in read():
        read_documents += len(part[0])
        for split, _, _, lengths in _kept(part):
            kept_documents += len(lengths)
            tokens[split] += int(lengths.sum())
    all_tokens = sum(tokens.values())
    pieces: dict[bytes, int] = {}
    if heldout_fraction > 0 and kept_documents and not tokens["heldout"]:
        train = ((digests, lengths) for part in read() for _, _, digests, lengths in _kept(part))
        pieces, tokens["heldout"] = choose_heldout(train, all_tokens, kept_documents, heldout_fraction)
        # A document of which a part stays has a separator more.
        tokens["train"] += sum(cut > 0 for cut in pieces.values()) - tokens["heldout"]
    counts = {
        "train": num_shards(tokens["train"], shard_tokens, MIN_SHARDS),
        "heldout": num_shards(tokens["heldout"], shard_tokens, 1),
    }
    lows: dict[str, list[int]] = {"train": [], "heldout": []}
    before = {"train": 0, "heldout": 0}
    last = {"train": -1, "heldout": -1}
    for part in read():
        for split, keys, digests, lengths in _kept(part):
            keys, lengths = left_for_training(pieces, keys, digests, lengths)
            if not len(keys):
                continue
            starts = before[split] + np.cumsum(lengths) - lengths
            shard = starts * counts[split] // tokens[split]
            new = np.flatnonzero(np.diff(shard, prepend=last[split]))
            lows[split] += [int(key) for key in keys[new]]
            before[split] += int(lengths.sum())
            last[split] = int(shard[-1])
    shards = [shard for split in ("train", "heldout") for shard in _ranges(split, lows[split])]
    if pieces:  # from the keys of all: the pieces alone are taken
        shards.append(ShardPlan("heldout-000000.tar", "heldout", _START["train"], _END["train"]))
    return Plan(tuple(shards), kept_documents, all_tokens, read_documents - kept_documents, pieces)


def _kept(part: Documents) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Split, keys, digests and lengths."""
    keys, digests, lengths = part
    kept = order_and_deduplicate(keys, digests)
    keys, digests, lengths = keys[kept], digests[kept], lengths[kept]
    middle = int(np.searchsorted(keys, HELDOUT_BIT))
    for split, side in (("train", slice(None, middle)), ("heldout", slice(middle, None))):
        if len(keys[side]):
            yield split, keys[side], digests[side], lengths[side]


def _ranges(split: str, lows: list[int]) -> Iterator[ShardPlan]:
    lows = sorted(set(lows))
    bounds = [_START[split], *lows[1:], _END[split]]
    for number in range(len(lows)):
        yield ShardPlan(f"{split}-{number:06d}.tar", split, bounds[number], bounds[number + 1])
