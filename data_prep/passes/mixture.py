"""Sources in given shares: which stretch of which source goes into which shard. Pure arithmetic over keys and lengths.

A source of T tokens in the order of its keys is read round and round until it has given its share of the mixture, G
tokens; shard k of K takes the documents that begin from k G / K on, up to (k + 1) G / K. So every shard holds every
source in its share, to within one document, and a document that comes again does so a whole source later.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.passes.bucket_files import mix
from data_prep.passes.placement import MIN_SHARDS, TRAIN_END, KeyRange, ShardPlan, Share, num_shards
from data_prep.shard_format.errors import UserError

MAX_EPOCHS = 100
MAX_TOKENS = 1 << 53
"""Of a mixture: float64 counts no further."""
_WEIGHT = re.compile(r"(?s)(.+)@(\d+(?:\.\d*)?|\.\d+)\Z")

SourcedDocuments = tuple[np.ndarray, np.ndarray, np.ndarray]
"""source int64 (n,), keys uint64 (n,) ascending, tokens with separator int64 (n,)."""


@dataclass(frozen=True)
class Mixture:
    shards: tuple[ShardPlan, ...]
    shares: tuple[Share, ...]


def split_weights(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """SOURCE@WEIGHT -> names and weights; none where no name has one. What is there by its whole name has none.

    Raises:
        UserError: some have a weight and others not, or one is 0.
    """
    found = [None if os.path.exists(name) else _WEIGHT.match(name) for name in names]
    if not any(found):
        return tuple(names), ()
    without = [name for name, match in zip(names, found, strict=True) if match is None]
    if without:
        raise UserError(
            f"{without[0]} has no weight, and others have; write SOURCE@WEIGHT for each, or for none"
        )
    plain = tuple(match[1] for match in found if match)
    weights = tuple(float(match[2]) for match in found if match)
    if not min(weights) > 0:
        raise UserError(
            f"{names[weights.index(min(weights))]}: a weight must be above 0; leave the source out"
        )
    return plain, weights


def plan_mixture(
    read: Callable[[], Iterable[SourcedDocuments]],
    names: Sequence[str],
    weights: Sequence[float],
    shard_tokens: int,
    mixture_tokens: int | None = None,
) -> Mixture:
    """Cut the sources into shards that hold each in its share.

    Args:
        read: gives the training documents, each once, in parts in ascending ranges of keys; called twice.
        names, weights: of the sources; only the weights' ratios count.
        mixture_tokens: of all training shards; None for as many as use every document at least once, so that one
            source is read exactly once.
    Raises:
        UserError: a source without a document of its own, or one that would be read more than MAX_EPOCHS times.
    """
    own = np.zeros(len(names), dtype=np.int64)
    for sources, _, lengths in read():
        np.add.at(own, sources, lengths)
    for name, tokens in zip(names, own.tolist(), strict=True):
        if not tokens:
            raise UserError(
                f"{name} has no documents of its own for a mixture: those that sources before it have are theirs; "
                "leave it out"
            )
    with np.errstate(all="ignore"):  # of extreme weights a share may be 0 or no number
        shares = np.array(weights, dtype=np.float64) / sum(weights)
        wanted = shares * float(mixture_tokens or (own / shares).max())
    if not wanted.max() <= MAX_TOKENS:
        raise UserError(
            f"the weights or --mixture-tokens ask for more than {MAX_TOKENS:,} training tokens; give weights that are "
            "less far apart, or fewer tokens"
        )
    goals = np.maximum(1, np.rint(wanted)).astype(np.int64)
    for name, goal, tokens in zip(names, goals.tolist(), own.tolist(), strict=True):
        if goal > MAX_EPOCHS * tokens:
            raise UserError(
                f"{name} has {tokens:,} tokens, which would be read {goal / tokens:,.0f} times for its share; give it "
                f"a lower weight, or fewer --mixture-tokens (at most {MAX_EPOCHS} times)"
            )
    count = num_shards(int(goals.sum()), shard_tokens, MIN_SHARDS)
    stretches = [_Stretches(index, int(goals[index]), int(own[index]), count) for index in range(len(names))]
    for sources, keys, lengths in read():
        for index, stretch in enumerate(stretches):
            stretch.add(keys[sources == index], lengths[sources == index])
    by_shard: list[list[KeyRange]] = [[] for _ in range(count)]
    for stretch in stretches:
        for shard, part in stretch.ranges():
            by_shard[shard].append(part)
    filled = [tuple(ranges) for ranges in by_shard if ranges]
    return Mixture(
        tuple(
            ShardPlan(f"train-{n:06d}.tar", "train", 0, TRAIN_END, ranges) for n, ranges in enumerate(filled)
        ),
        tuple(
            Share(float(share), stretch.own, stretch.tokens, stretch.documents, stretch.unused)
            for share, stretch in zip(shares, stretches, strict=True)
        ),
    )


class _Stretches:
    """One source, dealt out to the shards."""

    def __init__(self, source: int, goal: int, own: int, num_shards: int) -> None:
        self._source, self._goal, self._num_shards = source, goal, num_shards
        self.own = own
        self.tokens = self.documents = self.unused = 0
        self._before = 0
        copies = -(-goal // own)
        self._last = [-1] * copies
        self._bounds: list[list[tuple[int, int]]] = [[] for _ in range(copies)]
        """For each copy (first key, shard) of its stretches; the shard of what lies beyond the goal is `num_shards`."""

    def add(self, keys: np.ndarray, lengths: np.ndarray) -> None:
        """The next documents, in the order of their keys."""
        if not len(keys):
            return
        starts = self._before + np.cumsum(lengths) - lengths
        self._before += int(lengths.sum())
        for copy, bounds in enumerate(self._bounds):
            places = copy * self.own + starts
            within = places < self._goal
            shards = np.where(within, places * self._num_shards // self._goal, self._num_shards)
            new = np.flatnonzero(np.diff(shards, prepend=self._last[copy]))
            bounds += zip(keys[new].tolist(), shards[new].tolist(), strict=True)
            self._last[copy] = int(shards[-1])
            self.tokens += int(lengths[within].sum())
            self.documents += int(within.sum())
            if copy == 0:
                self.unused += int((~within).sum())

    def ranges(self) -> Iterable[tuple[int, KeyRange]]:
        """(shard, range), copy by copy."""
        for copy, bounds in enumerate(self._bounds):
            ends = [key for key, _ in bounds[1:]] + [TRAIN_END]
            for (low, shard), high in zip(bounds, ends, strict=True):
                if shard < self._num_shards:
                    yield shard, KeyRange(self._source, copy, low, high)


def shuffled(keys: np.ndarray, copy: int) -> np.ndarray:
    """Where documents of a copy stand in their shard, uint64 (n,): elsewhere in each copy, and among other sources'."""
    return mix(keys ^ mix(np.array([copy + 1], dtype=np.uint64)))
