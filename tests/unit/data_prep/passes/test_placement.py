"""Where documents go: a pure function of the set of documents, however they are dealt out."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.passes.bucket_files import HELDOUT_BIT, document_keys, open_bucket, write_bucket
from data_prep.passes.chosen_heldout import left_for_training
from data_prep.passes.placement import Documents, ShardPlan, num_shards, order_and_deduplicate, plan_shards


def digests_of(names: list[int]) -> np.ndarray:
    joined = b"".join(hashlib.blake2b(str(name).encode(), digest_size=16).digest() for name in names)
    return np.frombuffer(joined, dtype="<u8").reshape(-1, 2)


def documents_of(names: list[int], seed: int = 0, heldout: float = 0.2) -> Documents:
    digests = digests_of(names)
    lengths = np.array([300 + name * 7 % 400 for name in names], dtype=np.int64)
    return document_keys(digests, seed, heldout), digests, lengths


@settings(deadline=None, max_examples=50)
@given(names=st.lists(st.integers(0, 300), min_size=1, max_size=300), seed=st.integers(0, 9), data=st.data())
def test_plan_depends_on_the_set_of_documents(names: list[int], seed: int, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(names))
    first = plan_shards(lambda: [documents_of(names, seed)], 10_000)
    second = plan_shards(lambda: [documents_of(list(shuffled), seed)], 10_000)
    assert first == second
    assert first.documents == len(set(names))
    assert first.duplicates == len(names) - len(set(names))


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 400), shard_tokens=st.integers(2048, 50_000))
def test_shards_cover_every_key_once_and_are_even(count: int, shard_tokens: int) -> None:
    documents = documents_of(list(range(count)))
    keys, _, lengths = documents
    plan = plan_shards(lambda: [documents], shard_tokens)
    for split, start, end in (("train", 0, 1 << 63), ("heldout", 1 << 63, 1 << 64)):
        shards = [shard for shard in plan.shards if shard.split == split]
        if not shards:
            assert not any((keys >= HELDOUT_BIT) == (split == "heldout"))
            continue
        assert [shard.low for shard in shards] == [start, *(shard.high for shard in shards[:-1])]
        assert shards[-1].high == end
        sizes = [lengths[[shard.low <= int(key) < shard.high for key in keys]].sum() for shard in shards]
        assert min(sizes) > 0
        assert max(sizes) - min(sizes) <= 2 * lengths.max()
        assert max(sizes) <= shard_tokens + lengths.max()


def test_plan_in_parts_is_the_plan() -> None:
    keys, digests, lengths = documents_of(list(range(500)))
    bounds = [0, 1 << 61, 1 << 62, 1 << 63, (1 << 63) + (1 << 62)]

    def parts() -> list[Documents]:
        part = np.searchsorted(np.array(bounds, dtype=np.uint64), keys, side="right")
        return [(keys[part == p], digests[part == p], lengths[part == p]) for p in range(1, len(bounds) + 1)]

    assert plan_shards(parts, 9000) == plan_shards(lambda: [(keys, digests, lengths)], 9000)


def test_heldout_does_not_move_with_seed_or_sources() -> None:
    names = list(range(5000))
    heldout = document_keys(digests_of(names), 0, 0.05) >= HELDOUT_BIT
    assert 180 < heldout.sum() < 320
    other_seed = document_keys(digests_of(names), 1, 0.05)
    np.testing.assert_array_equal(other_seed >= HELDOUT_BIT, heldout)
    assert (other_seed != document_keys(digests_of(names), 0, 0.05)).all()
    more = document_keys(digests_of([*range(9000, 9500), *names]), 0, 0.05)[500:] >= HELDOUT_BIT
    np.testing.assert_array_equal(more, heldout)
    larger = document_keys(digests_of(names), 0, 0.1) >= HELDOUT_BIT
    assert (larger | ~heldout).all(), "a larger held-out part holds the smaller one"


@pytest.mark.parametrize(
    ("count", "scale", "whole", "share"),
    [(1, 4, False, 0.1), (1, 1000, False, 0.01), (5, 4000, False, 0.01), (60, 1, True, 0.1), (400, 20, True, 0.01)],
)  # fmt: skip
def test_something_is_held_out_where_chance_takes_nothing(
    count: int, scale: int, whole: bool, share: float
) -> None:
    """Whole documents, or of few large ones the ends; it depends on the set of documents alone."""
    keys, digests, lengths = documents_of(list(range(count)), heldout=0)
    lengths = lengths * scale
    tokens = int(lengths.sum())
    plans = [
        plan_shards(lambda: [(keys[order], digests[order], lengths[order])], 100_000, 0.01)  # noqa: B023
        for order in (np.arange(count), np.arange(count)[::-1])
    ]
    assert plans[0] == plans[1]
    half = np.uint64(1 << 62)
    sides = [keys < half, keys >= half]
    parts = plan_shards(lambda: [(keys[s], digests[s], lengths[s]) for s in sides], 100_000, 0.01)
    assert parts == plans[0]
    other = plan_shards(lambda: [(document_keys(digests, 7, 0), digests, lengths)], 100_000, 0.01)
    assert other.pieces == plans[0].pieces, "not moved by the seed"
    pieces = plans[0].pieces
    size = {digests[i].tobytes(): int(lengths[i]) for i in range(count)}
    held = sum(size[digest] - cut for digest, cut in pieces.items())
    assert all((cut == 0) is whole for cut in pieces.values())
    assert share / 2 <= held / tokens <= 0.2
    assert held >= 64
    *train, heldout = plans[0].shards
    assert heldout == ShardPlan("heldout-000000.tar", "heldout", 0, 1 << 63)
    left = {int(k): int(n) for k, n in zip(*left_for_training(pieces, keys, digests, lengths), strict=True)}
    assert sum(left.values()) == tokens - held + sum(cut > 0 for cut in pieces.values())
    sizes = [sum(n for key, n in left.items() if shard.low <= key < shard.high) for shard in train]
    assert sum(sizes) == sum(left.values())
    assert min(sizes) > 0


def test_nothing_is_chosen_where_chance_holds_out_or_nothing_is_wanted() -> None:
    documents = documents_of(list(range(300)))
    assert plan_shards(lambda: [documents], 10_000, 0.2) == plan_shards(lambda: [documents], 10_000)
    keys, digests, lengths = documents_of(list(range(300)), heldout=0)
    assert not plan_shards(lambda: [(keys, digests, lengths)], 10_000, 0).pieces


def test_every_shard_is_a_fair_sample_of_ordered_input() -> None:
    """The first half of the input is one kind of text: each shard must hold about half of it."""
    keys, digests, _ = documents_of(list(range(4000)), heldout=0.0)
    order = order_and_deduplicate(keys, digests)
    shares = [(part < 2000).mean() for part in np.array_split(order, 8)]
    assert max(abs(share - 0.5) for share in shares) < 0.1
    assert abs(np.corrcoef(np.arange(4000), order)[0, 1]) < 0.05


def test_colliding_keys_are_no_duplicates() -> None:
    keys = np.array([5, 5, 5], dtype=np.uint64)
    digests = np.array([[2, 1], [1, 1], [2, 1]], dtype=np.uint64)
    assert order_and_deduplicate(keys, digests).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, 0), (1, 1), (5000, 2), (100_000, 8), (4_000_000, 8), (40_000_001, 11)]
)
def test_num_shards(tokens: int, expected: int) -> None:
    assert num_shards(tokens, 4_000_000, at_least=8) == expected


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_bucket_file_survives_writing(tmp_path: Path, count: int) -> None:
    path = tmp_path / "a.bucket"
    names = list(range(count))
    digests = digests_of(names)
    keys = document_keys(digests, 3, 0.5)
    order = order_and_deduplicate(keys, digests)
    keys, digests = keys[order], digests[order]
    documents = [np.arange(name + 2, dtype=np.uint32) for name in names]
    write_bucket(path, {"read": count, "note": "é"}, keys, digests, documents)
    bucket = open_bucket(path)
    assert bucket.head["read"] == count
    assert (bucket.keys[1:] >= bucket.keys[:-1]).all()
    ends = bucket.ends.astype(int).tolist()
    found = [bucket.tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    for key, tokens in zip(bucket.keys.tolist(), found, strict=True):
        np.testing.assert_array_equal(tokens, documents[keys.tolist().index(key)])
    whole = bucket.between(0, 1 << 64)
    assert (whole.start, whole.stop) == (0, count)
