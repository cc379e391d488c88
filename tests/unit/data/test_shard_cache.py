"""The cache of shards from elsewhere: by content, whole or not at all, shared, and an error where it is unusable."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.shard_format.manifest import Manifest
from tests.loopback_stores import Store, served
from train.data.shard_cache import ShardCache
from train.data.shards import read_shard


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    with served(folder) as store:
        yield store


def test_a_shard_is_fetched_once_and_named_by_its_content(
    folder: Path, manifest: Manifest, store: Store, tmp_path: Path
) -> None:
    shard = manifest.splits["train"][0]
    cache, content = ShardCache(str(tmp_path)), (folder / shard.name).read_bytes()
    for _ in range(3):
        assert bytes(read_shard(store.url, shard, cache=cache)) == content
    assert len(store.requests) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [f"{shard.sha256[:16]}-{shard.name}"]
    assert cache.get(replace(shard, sha256="0" * 64)) is None


def test_a_damaged_file_is_fetched_again_at_once(
    folder: Path, manifest: Manifest, store: Store, tmp_path: Path
) -> None:
    """Cut short, too long, of other content."""
    shard = manifest.splits["train"][0]
    cache, content = ShardCache(str(tmp_path)), (folder / shard.name).read_bytes()
    damages = [content[:-1], b"", content + b"x", bytes(len(content))]
    for damaged in damages:
        cache.path(shard).write_bytes(damaged)
        assert bytes(read_shard(store.url, shard, cache=cache)) == content
        assert cache.path(shard).read_bytes() == content
    assert len(store.requests) == len(damages)


def test_what_is_wrong_at_its_source_is_not_kept(manifest: Manifest, store: Store, tmp_path: Path) -> None:
    shard = manifest.splits["train"][0]
    cache = ShardCache(str(tmp_path / "cache"))
    for wrong, message in (
        (replace(shard, bytes=shard.bytes + 1), "is truncated"),
        (replace(shard, bytes=shard.bytes - 1), "was altered, it is longer"),
        (replace(shard, sha256="0" * 64), "was altered, its sha256"),
        (replace(shard, name="none.tar"), r"none\.tar at http\S+ is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            read_shard(store.url, wrong, cache=cache)
    assert not (tmp_path / "cache").exists()


def test_ranks_and_hosts_may_share_a_folder(
    folder: Path, manifest: Manifest, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of one number, on two hosts, and slow writing."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    shard, fsync = manifest.splits["train"][0], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: time.sleep(0.1) or fsync(handle))
    caches, found = [ShardCache(str(tmp_path)) for _ in range(4)], []
    threads = [
        threading.Thread(target=lambda c=cache: found.append(read_shard(store.url, shard, cache=c)))
        for cache in caches
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = (folder / shard.name).read_bytes()
    assert found == [content] * 4
    assert [entry.name for entry in tmp_path.iterdir()] == [caches[0].path(shard).name]
    assert caches[0].path(shard).read_bytes() == content


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    stale, fresh = tmp_path / ".x.tar.1.partial", tmp_path / ".x.tar.2.partial"
    for part in (stale, fresh):
        part.write_bytes(b"half")
    os.utime(stale, (0, 0))
    ShardCache(str(tmp_path))
    assert not stale.exists()
    assert fresh.exists()


def test_a_clock_that_is_hours_ahead_costs_a_copy_and_no_run(
    folder: Path, manifest: Manifest, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process of such a clock begins while a shard is written, and removes what looks old."""
    shard, fsync, now = manifest.splits["train"][0], os.fsync, time.time

    def begun_by_another(handle: int) -> None:
        fsync(handle)
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: now() + 7200)
            ShardCache(str(tmp_path))

    cache, content = ShardCache(str(tmp_path)), (folder / shard.name).read_bytes()
    monkeypatch.setattr(os, "fsync", begun_by_another)
    assert bytes(read_shard(store.url, shard, cache=cache)) == content
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "fsync", fsync)
    assert bytes(read_shard(store.url, shard, cache=cache)) == content
    assert cache.path(shard).exists()


def test_a_folder_that_cannot_be_used_is_an_error(
    manifest: Manifest, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = manifest.splits["train"][0]
    (tmp_path / "file").write_text("")
    begins = re.escape(f"shards cannot be kept in data.cache_dir {tmp_path / 'file'} (")
    with pytest.raises(ValueError, match=begins + r".*\): choose another folder, or none"):
        read_shard(store.url, shard, cache=ShardCache(str(tmp_path / "file")))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    cache = ShardCache(str(tmp_path / "full"))
    with pytest.raises(ValueError, match=r"No space left on device.*\): make room there, or choose another"):
        read_shard(store.url, shard, cache=cache)
    assert list((tmp_path / "full").iterdir()) == []
