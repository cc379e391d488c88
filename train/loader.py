"""Shards to micro batches of token windows, for any rank, from any step.

The flow: order.py says which windows of which shards a step's lanes take; threads read those shards ahead
(shard_reader.py), permute each one's documents for the epoch (packing.py) and keep the result for the lanes
that are inside it; one thread copies the windows into micro batches and puts them into a bounded queue that
the trainer takes from. Nothing here is random and there is nothing to save: a loader is made anew with a
start step, and its first batch costs one shard per lane whatever the step.

Memory of a rank, with K lanes over W ranks: at most 2 * K / W shards' token arrays (2 bytes a token; twice,
because the next epoch's shards are read while the last ones of this epoch are in use), one shard's file and
its index per reader thread, and PREFETCH_TOKENS of queued micro batches (4 bytes a token). Read more than
once: a shard that a lane boundary cuts is read by both its lanes, unless they are in it at the same time on
one rank, so at most K - 1 shards an epoch; at most W - 1 of them are read by two ranks.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from queue import Empty, Full, Queue, SimpleQueue

import numpy as np
import torch

from data_prep.shard_format import Manifest
from train.order import FRAME_TOKENS, DataOrder, check_fit, windows_per_shard
from train.packing import cut_windows, document_bounds, frame_windows, permute_documents
from train.shard_reader import ShardCache, check_shards, read_shard, shard_tokens

__all__ = ["BatchLoader", "MicroBatch", "check_shards", "heldout_windows"]

PREFETCH_TOKENS = 1 << 20
_READERS = 2
_LOOKAHEAD_STEPS = 4


@dataclass(frozen=True)
class MicroBatch:
    """A rank's share of one accumulation step."""

    step: int
    """Global step, from 0."""
    epoch: int
    micro_step: int
    """Accumulation step within the global step, from 0."""
    input_ids: torch.Tensor
    """(micro_batch_size, sequence_length) int32 on the CPU: [CLS] text [SEP]."""
    window_ids: torch.Tensor
    """(micro_batch_size,) int64: the window's number in the corpus, the same range in every epoch."""


class BatchLoader:
    """The micro batches of one rank.

    The global batch of a step is the ranks' rows in rank order, each rank's micro batches in order; it
    depends on the shards, the seed, the sequence length, the global batch and `lanes` alone.

    Args:
        shards: folder or URL of the shards, see shard_reader.shard_url.
        verify: "size" compares file sizes at the start, "full" sha256 at the start and at each reading.
        cache_dir: folder for shards that are not local (webdataset's cache); None reads them anew each time.
    Raises:
        ValueError: a shard is missing, truncated or altered; fewer windows than a global batch; a world size
            that does not fit (the message lists those that do).
    """

    def __init__(
        self,
        shards: str,
        manifest: Manifest,
        *,
        split: str = "train",
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        lanes: int = 64,
        rank: int = 0,
        world_size: int = 1,
        verify: str = "size",
        cache_dir: str | None = None,
    ) -> None:
        self._accumulation = check_fit(global_batch_size, lanes, world_size, micro_batch_size)
        infos = manifest.splits[split]
        windows = windows_per_shard([shard.tokens for shard in infos], sequence_length)
        self.order = DataOrder(windows, global_batch_size, seed, lanes)
        self.steps_per_epoch = self.order.steps_per_epoch
        check_shards(shards, manifest, verify, splits=(split,))
        self._shards, self._infos, self._tokenizer = shards, infos, manifest.tokenizer
        self._verify = verify
        self._cache = ShardCache(cache_dir) if cache_dir is not None else None
        self._sequence_length = sequence_length
        self._micro_batch_size = micro_batch_size
        share = self.order.num_lanes // world_size
        self._lanes = range(rank * share, (rank + 1) * share)

    def batches(self, start_step: int, stop_step: int) -> Iterator[MicroBatch]:
        """The micro batches of steps start_step to stop_step - 1, read ahead in the background.

        Threads end when the iterator does, also when it is closed or dropped early. What fails in them is
        raised here. Each call opens its shards anew: call it once for a run, not once for a step.
        """
        self.order.position(start_step)  # refuses a negative step before a thread starts
        window_bytes = self._micro_batch_size * self._sequence_length
        return _in_background(
            lambda stop: self._produce(start_step, stop_step, stop), max(2, PREFETCH_TOKENS // window_bytes)
        )

    def _produce(self, start_step: int, stop_step: int, stop: threading.Event) -> Iterator[MicroBatch]:
        with _OpenShards(self._prepare) as opened:
            for step in range(start_step, stop_step):
                if step == start_step:
                    for ahead in range(step, min(step + _LOOKAHEAD_STEPS, stop_step)):
                        self._request(opened, ahead)
                if step + _LOOKAHEAD_STEPS < stop_step:
                    self._request(opened, step + _LOOKAHEAD_STEPS)
                yield from self._step(step, opened, stop)
                opened.forget(step)

    def _request(self, opened: _OpenShards, step: int) -> None:
        epoch, _ = self.order.position(step)
        for lane in self._lanes:
            for run in self.order.runs(step, lane):
                opened.request(epoch, run.shard, step)

    def _step(self, step: int, opened: _OpenShards, stop: threading.Event) -> Iterator[MicroBatch]:
        epoch, _ = self.order.position(step)
        pieces = (
            (run, opened.get(epoch, run.shard, stop))
            for lane in self._lanes
            for run in self.order.runs(step, lane)
        )
        rows, length = self._micro_batch_size, self._sequence_length
        tokens, ids, filled, micro_step = _empty(rows, length), _ids(rows), 0, 0
        for run, shard in pieces:
            done = 0
            while done < run.length:
                count = min(run.length - done, rows - filled)
                chosen = shard.order[run.first + done : run.first + done + count]
                out = slice(filled, filled + count)
                frame_windows(
                    shard.windows[chosen], tokens[out], self._tokenizer.cls_id, self._tokenizer.sep_id
                )
                ids[out] = chosen + self.order.first_window_id(run.shard)
                done += count
                filled += count
                if filled == rows:
                    yield MicroBatch(step, epoch, micro_step, torch.from_numpy(tokens), torch.from_numpy(ids))
                    tokens, ids, filled, micro_step = _empty(rows, length), _ids(rows), 0, micro_step + 1

    def _prepare(self, epoch: int, shard: int) -> _EpochShard:
        info = self._infos[shard]
        data = read_shard(self._shards, info, verify=self._verify, cache=self._cache)
        tokens = shard_tokens(data, info, self._tokenizer)
        del data
        bounds = document_bounds(tokens, self._tokenizer.sep_id)
        documents = self.order.document_permutation(epoch, shard, len(bounds) - 1)
        permuted = permute_documents(tokens, bounds, documents)
        windows = cut_windows(permuted, self._sequence_length - FRAME_TOKENS)
        return _EpochShard(windows, self.order.window_permutation(epoch, shard))


def heldout_windows(
    shards: str, manifest: Manifest, sequence_length: int, max_windows: int, *, cache_dir: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fixed windows for evaluation, spread evenly over the held-out split: documents in their stored order.

    Returns:
        input_ids (N, sequence_length) int32, window_ids (N,) int64, N = min(max_windows, windows there are).
    Raises:
        ValueError: the held-out split has no window of this length, or a shard is bad.
    """
    infos = manifest.splits["heldout"]
    windows = windows_per_shard([shard.tokens for shard in infos], sequence_length)
    total = sum(windows)
    if total == 0 or max_windows < 1:
        raise ValueError(
            f"the held-out split has {total} windows of {sequence_length} tokens, {max_windows} are wanted: "
            "write shards with a larger held-out share, or turn evaluation off"
        )
    count = min(max_windows, total)
    ids = np.arange(count, dtype=np.int64) * total // count
    tokens = _empty(count, sequence_length)
    cache = ShardCache(cache_dir) if cache_dir is not None else None
    first = 0
    for info, number in zip(infos, windows, strict=True):
        inside = (ids >= first) & (ids < first + number)
        if inside.any():
            content = shard_tokens(read_shard(shards, info, cache=cache), info, manifest.tokenizer)
            chosen = cut_windows(content, sequence_length - FRAME_TOKENS)[ids[inside] - first]
            framed = _empty(len(chosen), sequence_length)
            frame_windows(chosen, framed, manifest.tokenizer.cls_id, manifest.tokenizer.sep_id)
            tokens[inside] = framed
        first += number
    return torch.from_numpy(tokens), torch.from_numpy(ids)


@dataclass(frozen=True)
class _EpochShard:
    windows: np.ndarray
    """(windows, content) token ids, cut from the shard's documents in the epoch's order."""
    order: np.ndarray
    """(windows,) int64: window index by place."""


class _OpenShards:
    """The prepared shards that the coming steps use: read by daemon threads, freed after their last use."""

    def __init__(self, prepare: Callable[[int, int], _EpochShard]) -> None:
        self._prepare = prepare
        self._jobs: SimpleQueue[tuple[Future[_EpochShard], int, int] | None] = SimpleQueue()
        self._open: dict[tuple[int, int], Future[_EpochShard]] = {}
        self._last_use: dict[tuple[int, int], int] = {}
        self._threads = [threading.Thread(target=self._read, daemon=True) for _ in range(_READERS)]

    def __enter__(self) -> _OpenShards:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for future in self._open.values():
            future.cancel()
        for _ in self._threads:
            self._jobs.put(None)

    def request(self, epoch: int, shard: int, step: int) -> None:
        key = (epoch, shard)
        self._last_use[key] = step
        if key not in self._open:
            self._open[key] = Future()
            self._jobs.put((self._open[key], epoch, shard))

    def get(self, epoch: int, shard: int, stop: threading.Event) -> _EpochShard:
        future = self._open[epoch, shard]
        while not stop.is_set():
            if wait([future], timeout=0.1).done:
                return future.result()
        raise _Stopped

    def forget(self, step: int) -> None:
        """Free the shards whose last requested use was in `step` or before."""
        for key in [key for key, last in self._last_use.items() if last <= step]:
            del self._last_use[key], self._open[key]

    def _read(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, epoch, shard = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._prepare(epoch, shard))
            except BaseException as error:
                future.set_exception(error)


class _Stopped(Exception):
    """The consumer left; ends the producer."""


def _in_background(
    produce: Callable[[threading.Event], Iterator[MicroBatch]], depth: int
) -> Iterator[MicroBatch]:
    """What `produce` yields, made by a thread up to `depth` items ahead; its errors are raised here."""
    stop = threading.Event()
    queue: Queue[MicroBatch | BaseException | None] = Queue(depth)

    def put(item: MicroBatch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return queue.put(item, timeout=0.1)
            except Full:
                continue
        raise _Stopped

    def run() -> None:
        try:
            for item in produce(stop):
                put(item)
            put(None)
        except _Stopped:
            pass
        except BaseException as error:
            with contextlib.suppress(_Stopped):
                put(error)

    thread = threading.Thread(target=run, name="batches", daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        while True:  # what is queued is large: free it now
            try:
                queue.get_nowait()
            except Empty:
                break
        thread.join(timeout=5)


def _empty(rows: int, length: int) -> np.ndarray:
    return np.empty((rows, length), dtype=np.int32)


def _ids(rows: int) -> np.ndarray:
    return np.empty(rows, dtype=np.int64)
