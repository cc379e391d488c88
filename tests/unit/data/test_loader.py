"""The loader: batches against the stock reader's tokens, restarts, threads, memory, and bad shards."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import webdataset

from data_prep.shard_format.manifest import Manifest, ShardInfo
from tests.tiny_shards import SEP, TOKENIZER, random_documents, shard_of, write_tiny_shards
from train.data import loader as loader_module
from train.data.loader import BatchLoader, MicroBatch, heldout_windows
from train.data.order import DataOrder
from train.data.shards import read_shard, shard_tokens
from train.errors import UserError

LENGTH, BATCH, LANES = 16, 16, 8


def make(folder: Path | str, manifest: Manifest, **options: object) -> BatchLoader:
    settings = {
        "sequence_length": LENGTH,
        "global_batch_size": BATCH,
        "micro_batch_size": 2,
        "seed": 1,
        "lanes": LANES,
        **options,
    }
    return BatchLoader(str(folder), manifest, **settings)  # type: ignore[arg-type]


def global_batches(
    loaders: list[BatchLoader], start: int, stop: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, window_ids) of each step, the ranks' rows in rank order."""
    steps: dict[int, list[MicroBatch]] = {step: [] for step in range(start, stop)}
    for loader in loaders:
        for batch in loader.batches(start, stop):
            assert (batch.input_ids.dtype, batch.window_ids.dtype) == (torch.int32, torch.int64)
            steps[batch.step].append(batch)
    return [
        (torch.cat([b.input_ids for b in batches]), torch.cat([b.window_ids for b in batches]))
        for batches in steps.values()
    ]


def equal(a: list[tuple[torch.Tensor, torch.Tensor]], b: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)
    )


def epoch_by_hand(folder: Path, manifest: Manifest, order: DataOrder, epoch: int) -> dict[int, list[int]]:
    """Every window of an epoch by id, from stock webdataset's tokens with nothing but Python lists."""
    windows = {}
    for index, shard in enumerate(manifest.splits["train"]):
        reader = webdataset.WebDataset(str(folder / shard.name), shardshuffle=False).decode()
        tokens = [token for sample in reader for token in sample["tokens.npy"].tolist()]
        documents, document = [], []
        for token in tokens:
            document.append(token)
            if token == SEP:
                documents.append(document)
                document = []
        permuted = [
            token
            for place in order.document_permutation(epoch, index, len(documents)).tolist()
            for token in documents[place]
        ]
        for number in range(len(permuted) // (LENGTH - 2)):
            content = permuted[number * (LENGTH - 2) : (number + 1) * (LENGTH - 2)]
            windows[order.first_window_id(index) + number] = [TOKENIZER.cls_id, *content, SEP]
    return windows


def test_an_epoch_holds_every_window_once_with_its_text(folder: Path, manifest: Manifest) -> None:
    loader = make(folder, manifest)
    for epoch in (0, 3):
        expected = epoch_by_hand(folder, manifest, loader.order, epoch)
        first = epoch * loader.steps_per_epoch
        seen: dict[int, list[int]] = {}
        for batch in loader.batches(first, first + loader.steps_per_epoch):
            assert batch.epoch == epoch
            for row, number in zip(batch.input_ids.tolist(), batch.window_ids.tolist(), strict=True):
                assert number not in seen
                seen[number] = row
        assert all(seen[number] == expected[number] for number in seen)
        assert len(expected) - BATCH < len(seen) <= len(expected)


def test_the_order_never_changes(folder: Path, manifest: Manifest) -> None:
    # Another digest here is another data order for every run: runs could not be resumed or compared.
    loader = make(folder, manifest)
    digest = hashlib.sha256()
    for input_ids, window_ids in global_batches([loader], 0, loader.steps_per_epoch + 2):
        digest.update(input_ids.numpy().astype("<i4").tobytes() + window_ids.numpy().astype("<i8").tobytes())
    assert digest.hexdigest() == "b90a310b173e4f26248854622cee66c4830f9784fa01a18023f29f2e424bb50e"


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (1, 16), (2, 8), (2, 4), (4, 2), (8, 2), (8, 1)])
def test_world_size_micro_batch_and_restart_change_nothing(
    folder: Path, manifest: Manifest, world_size: int, micro: int
) -> None:
    reference = make(folder, manifest)
    last = reference.steps_per_epoch + 6  # over the border of an epoch
    expected = global_batches([reference], 0, last)
    loaders = [
        make(folder, manifest, micro_batch_size=micro, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for start in (0, 1, reference.steps_per_epoch - 1, reference.steps_per_epoch):
        assert equal(global_batches(loaders, start, last), expected[start:])


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_the_number_of_reader_threads_changes_nothing(
    folder: Path, manifest: Manifest, readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = global_batches([make(folder, manifest)], 20, 60)
    monkeypatch.setattr(loader_module, "READER_THREADS", readers)
    monkeypatch.setattr(loader_module, "LOOKAHEAD_STEPS", readers - 1)
    assert equal(global_batches([make(folder, manifest)], 20, 60), expected)


def test_only_the_shards_of_the_first_steps_are_read(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = loader_module.read_shard
    monkeypatch.setattr(
        loader_module, "read_shard", lambda *a, **k: read.append(a[1].name) or original(*a, **k)
    )
    loader = make(folder, manifest)
    for start in (0, 10_000):
        read.clear()
        assert len(list(loader.batches(start, start + 1))) == BATCH // 2
        lanes = {run.shard for lane in range(LANES) for run in loader.order.runs(start, lane)}
        assert len(read) == len(set(read)) == len(lanes)


def batch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("batches")]


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_threads_end_with_the_iterator(folder: Path, manifest: Manifest) -> None:
    loader = make(folder, manifest)
    assert len(list(loader.batches(0, 5))) == 5 * BATCH // 2
    assert wait_for(lambda: not batch_threads())
    for leave in ("close", "drop"):
        batches = loader.batches(0, 10**9)
        next(batches)
        assert batch_threads()
        if leave == "close":
            batches.close()  # type: ignore[attr-defined]
        del batches
        assert wait_for(lambda: not batch_threads())
    assert list(loader.batches(5, 5)) == []
    with pytest.raises(ValueError, match="step is -1"):
        loader.batches(-1, 3)


def test_it_reads_ahead_and_no_further_than_it_says(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "PREFETCH_TOKENS", 5 * 2 * LENGTH)
    made: list[int] = []
    original = BatchLoader._micro_batch
    monkeypatch.setattr(
        BatchLoader, "_micro_batch", lambda *arguments: made.append(1) or original(*arguments)
    )
    batches = make(folder, manifest).batches(0, 10**6)
    next(batches)
    assert wait_for(lambda: len(made) == 1 + 5 + 1)  # taken, queued, and the one that waits
    time.sleep(0.3)
    assert len(made) == 7
    batches.close()  # type: ignore[attr-defined]


def test_memory_and_readings_stay_within_what_is_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_tiny_shards(tmp_path, shards=40, heldout=0, documents=40)
    largest = max(shard.tokens for shard in manifest.splits["train"])
    resident: list[int] = []
    read: list[tuple[int, int]] = []
    micro_batch, prepare = BatchLoader._micro_batch, BatchLoader._prepare

    def watched(*arguments: object) -> MicroBatch:
        shards = arguments[4]
        finished = [f.result() for f in shards._items.values() if f.done()]  # type: ignore[attr-defined]
        resident.append(sum(shard.windows.size for shard in finished))
        return micro_batch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(BatchLoader, "_micro_batch", watched)
    monkeypatch.setattr(BatchLoader, "_prepare", lambda self, key: read.append(key) or prepare(self, key))
    for world_size in (1, 4):
        resident.clear()
        read.clear()
        for rank in range(world_size):
            loader = make(tmp_path, manifest, rank=rank, world_size=world_size)
            for _ in loader.batches(0, 2 * loader.steps_per_epoch):
                pass
        ahead = (loader_module.LOOKAHEAD_STEPS + 1) * BATCH // world_size * LENGTH
        assert max(resident) <= LANES // world_size * 2 * largest + ahead
        assert max(resident) < sum(shard.tokens for shard in manifest.splits["train"])
        for epoch in (0, 1):
            shards = [shard for e, shard in read if e == epoch]
            assert len(shards) <= len(set(shards)) + LANES - 1


def test_heldout_windows_are_fixed_and_spread(folder: Path, manifest: Manifest) -> None:
    total = manifest.splits["heldout"][0].tokens // (LENGTH - 2)
    every, numbers = heldout_windows(str(folder), manifest, LENGTH, 10**6)
    assert every.shape == (total, LENGTH)
    assert numbers.tolist() == list(range(total))
    some, chosen = heldout_windows(str(folder), manifest, LENGTH, 7)
    assert chosen.tolist() == [index * total // 7 for index in range(7)]
    assert torch.equal(some, every[chosen])
    tokens = shard_tokens(
        read_shard(str(folder), manifest.splits["heldout"][0]), manifest.splits["heldout"][0], TOKENIZER
    )
    assert every[:, 1:-1].flatten().tolist() == tokens[: total * (LENGTH - 2)].tolist()
    with pytest.raises(ValueError, match="held-out split has 0 windows"):
        heldout_windows(str(folder), manifest, 100_000, 7)


def test_an_altered_shard_is_found_when_it_is_read(tmp_path: Path) -> None:
    manifest = write_tiny_shards(tmp_path)
    path = tmp_path / manifest.splits["heldout"][0].name
    content = bytearray(path.read_bytes())
    first = content.index(b" \n", 512) + 2
    content[first] = 5 + (content[first] == 5)  # another ordinary token
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard heldout-000000\.tar at .* was altered, its sha256"):
        heldout_windows(str(tmp_path), manifest, LENGTH, 7)


def test_ranks_share_a_full_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, read = write_tiny_shards(tmp_path), []

    def recorded(shards: str, shard: ShardInfo, **options: object) -> bytearray:
        read.append(shard.name)
        return read_shard(shards, shard)

    monkeypatch.setattr("train.data.shard_checks.read_shard", recorded)
    for rank in range(2):
        make(tmp_path, manifest, rank=rank, world_size=2, verify="full")
    assert sorted(read) == [shard.name for shard in manifest.splits["train"]]


def test_what_does_not_fit_is_refused_at_once(folder: Path, manifest: Manifest) -> None:
    with pytest.raises(ValueError, match=r"use a world size of 1, 2, 4, 8$"):
        make(folder, manifest, world_size=3)
    with pytest.raises(ValueError, match="fewer than one batch of 16000"):
        make(folder, manifest, global_batch_size=16_000)
    with pytest.raises(ValueError, match=r"data\.sequence_length is 2"):
        make(folder, manifest, sequence_length=2)


def test_a_shard_that_goes_bad_while_training_stops_the_consumer(tmp_path: Path) -> None:
    folder, manifest = tmp_path, write_tiny_shards(tmp_path)
    loader = make(folder, manifest)
    (folder / "train-000001.tar").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"train-000001\.tar at .* is truncated, 1 of"):
        list(loader.batches(0, loader.steps_per_epoch))
    assert wait_for(lambda: not batch_threads())


@pytest.mark.parametrize("damage", ["deleted", "replaced"])
def test_a_shard_that_goes_while_a_run_reads_is_named(tmp_path: Path, damage: str) -> None:
    manifest = write_tiny_shards(tmp_path)
    batches = make(tmp_path, manifest).batches(0, 10_000)
    next(batches)
    for shard in manifest.splits["train"]:
        path = tmp_path / shard.name
        if damage == "deleted":
            path.unlink()
        else:  # by one of the same size
            path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(UserError, match=r"shard train-\d+\.tar .*fetch or write the shards again"):
        list(batches)
    assert wait_for(lambda: not batch_threads())


def test_uint32_shards(tmp_path: Path) -> None:
    tokenizer = replace(TOKENIZER, vocab_size=70_000)
    documents = random_documents(0, 60, vocab_size=70_000)
    shards = tuple(shard_of(tmp_path, f"train-{i:06d}.tar", documents[i::2]) for i in range(2))
    manifest = Manifest(tokenizer, {"train": shards, "heldout": ()}, "histogram.npy")
    ids = torch.cat([ids for ids, _ in global_batches([make(tmp_path, manifest)], 0, 2)])
    assert ids.max() > 65_535
    values = {int(token) for document in documents for token in document}
    assert set(itertools.chain(*ids.tolist())) <= values | {tokenizer.cls_id}
