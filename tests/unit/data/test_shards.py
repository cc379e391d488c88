"""Shards from anywhere: what is missing, cut short, altered or misnamed, and the histogram beside them."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.shard_format.manifest import Manifest
from tests.loopback_stores import served
from tests.tiny_shards import with_histogram, write_tiny_shards
from tests.unit.data.test_hostile_shards import Bomb, headed, npy
from train.data.shard_cache import ShardCache
from train.data.shard_checks import check_shards
from train.data.shards import histogram_digest, read_histogram, read_shard


def test_every_way_to_write_a_folder_leads_to_its_files(
    folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    spaced = tmp_path / "two words"
    spaced.symlink_to(folder)
    shard = manifest.splits["train"][0]
    expected = (folder / shard.name).read_bytes()
    for root in (
        str(folder),
        f"{folder}/",
        f"file:{folder}",
        f"file://{folder}",
        f"file://localhost{folder}",
        f"file://{tmp_path}/two%20words/",
        f"file:{os.path.relpath(folder)}",
    ):
        assert Manifest.load(root) == manifest
        check_shards(root, manifest)
        cache = ShardCache(str(tmp_path / "cache"))
        assert bytes(read_shard(root, shard, cache=cache)) == expected
        assert read_histogram(root, manifest).tolist() == [i * i for i in range(64)]
    assert not (tmp_path / "cache").exists()
    with pytest.raises(
        ValueError, match=r"file://elsewhere/\S+ names a file on 'elsewhere': give file:///PATH"
    ):
        Manifest.load(f"file://elsewhere{folder}")


@pytest.fixture
def copy(tmp_path: Path) -> tuple[Path, Manifest]:
    return tmp_path, write_tiny_shards(tmp_path)


def test_missing_truncated_and_altered_shards_are_named(copy: tuple[Path, Manifest]) -> None:
    folder, manifest = copy
    path = folder / "train-000002.tar"
    content = path.read_bytes()
    check_shards(str(folder), manifest, "full")
    for spoil, message in (
        (path.unlink, r"shard train-000002\.tar at .* is missing: fetch or write the shards again"),
        (lambda: path.write_bytes(content[:-512]), r"shard train-000002\.tar at .* is truncated, \d+ of \d+"),
        (
            lambda: path.write_bytes(content + b"\0" * 512),
            r"train-000002\.tar at .* was altered, it is longer",
        ),
    ):
        spoil()
        with pytest.raises(ValueError, match=message):
            check_shards(str(folder), manifest)
        path.write_bytes(content)
    changed = bytearray(content)
    changed[700] ^= 1
    path.write_bytes(changed)
    check_shards(str(folder), manifest)
    with pytest.raises(ValueError, match=r"shard train-000002\.tar at .* was altered, its sha256"):
        check_shards(str(folder), manifest, "full")
    path.write_bytes(content)
    (folder / "heldout-000000.tar").unlink()
    check_shards(str(folder), manifest, "full", splits=("train",))
    with pytest.raises(ValueError, match=r"shard heldout-000000\.tar at .* is missing"):
        check_shards(str(folder), manifest)


def altered(path: Path) -> None:
    """Change one token, and nothing that another check than sha256 would see."""
    content = bytearray(path.read_bytes())
    at = content.index(b" \n", 512) + 2  # the first token of a document: an ordinary one
    content[at] = 5 + (content[at] == 5)
    path.write_bytes(content)


def test_ranks_share_the_reading_of_all_shards(copy: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = copy
    cache = ShardCache(str(tmp_path / "cache"))
    with served(folder) as store:
        for rank in range(3):
            check_shards(store.url, manifest, "full", rank=rank, world_size=3, cache=cache)
    shards = [shard.name for split in manifest.splits.values() for shard in split]
    for method, times in (("GET", 1), ("HEAD", 3)):
        asked = [line.split()[1][1:] for line in store.requests if line.startswith(method)]
        histogram = [manifest.token_histogram] * 3 if method == "GET" else []  # every rank loads it
        assert sorted(asked) == sorted([*shards * times, *histogram])
    altered(folder / shards[1])
    for rank in (0, 2):
        check_shards(str(folder), manifest, "full", rank=rank, world_size=3)
    with pytest.raises(ValueError, match=rf"shard {re.escape(shards[1])} at .* was altered, its sha256"):
        check_shards(str(folder), manifest, "full", rank=1, world_size=3)
    (folder / shards[0]).unlink()
    with pytest.raises(ValueError, match=rf"shard {re.escape(shards[0])} at .* is missing"):  # by every rank
        check_shards(str(folder), manifest, "full", rank=1, world_size=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"is missing: fetch or write the shards again"),
        (
            lambda: npy(np.ones(64)),
            r"is damaged \(it is an array of <f8, shape \(64,\), not of <i8 in one row\)",
        ),
        (lambda: npy(np.ones(63, dtype=np.int64)), "has 63 counts, the lowest 0: it must have 64"),
        (lambda: npy(np.ones(65, dtype=np.int64)), "has 65 counts"),
        (lambda: npy(np.ones((8, 8), dtype=np.int64)), r"shape \(8, 8\)"),
        (lambda: npy(np.ones(100_000, dtype=np.int64)), "bytes of numbers for a shape of"),
        (lambda: npy(np.array([5] * 63 + [-1])), "the lowest -1: it must have 64, none below 0"),
        (lambda: npy(np.array([Bomb()], dtype=object), True), r"array of \|O"),
        (lambda: headed("[" * 9000), "is not an .npy file of one array"),
        (lambda: b"", "is not an .npy file of one array"),
    ],
)
def test_a_bad_histogram_is_told(
    tmp_path: Path, manifest: Manifest, content: Callable[[], bytes] | None, message: str
) -> None:
    manifest = replace(manifest, token_histogram_sha256=None)
    if content is not None:
        (tmp_path / manifest.token_histogram).write_bytes(content())
    with pytest.raises(ValueError, match=r"token histogram histogram\.npy at .*" + message):
        read_histogram(str(tmp_path), manifest)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_histogram_with_any_bit_flipped_is_refused(tmp_path: Path, recorded: bool) -> None:
    """By its sha256; in a manifest from before there was one, by the number of tokens that it counts."""
    manifest = write_tiny_shards(tmp_path, shards=1, documents=4)
    tokens = sum(shard.tokens for shard in manifest.splits["train"])
    counts = np.full(64, tokens // 64)
    counts[7] += tokens - counts.sum()
    manifest = with_histogram(tmp_path, manifest, counts)
    if not recorded:
        manifest = replace(manifest, token_histogram_sha256=None)
        manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert read_histogram(str(tmp_path), manifest).tolist() == counts.tolist()
    digest = histogram_digest(str(tmp_path), manifest)
    assert len(digest) == 64
    path = tmp_path / manifest.token_histogram
    whole = path.read_bytes()
    for position in random.Random(0).sample(range(8 * len(whole)), 200):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"token histogram histogram\.npy at .*write the shards again"):
            read_histogram(str(tmp_path), manifest)
        with pytest.raises(ValueError, match=r"token histogram histogram\.npy at"):
            check_shards(str(tmp_path), manifest, verify="full")
    path.write_bytes(whole)
    check_shards(str(tmp_path), manifest, verify="full")


@pytest.mark.parametrize("name", ["a;touch pwned.tar", "$(id).tar", "a b.tar", "../x.tar", "-rf.tar", ""])
def test_a_shard_name_that_leads_elsewhere_is_refused(manifest: Manifest, name: str) -> None:
    with pytest.raises(ValueError, match="only letters, digits"):
        read_shard("/tmp", replace(manifest.splits["train"][0], name=name))
