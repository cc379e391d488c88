"""Shards to micro batches of token windows, for any rank, from any step.

The flow: order.py says which windows of which shards a step's lanes take; threads read those shards ahead
(shards.py), permute each one's documents for the epoch (packing.py) and keep the result for the lanes
that are inside it; one thread copies the windows into micro batches and puts them into a bounded queue that
the trainer takes from. Nothing here is random and there is nothing to save: a loader is made anew with a
start step, and its first batch costs one shard per lane whatever the step.

Memory of a rank that serves K/W lanes: at most two shards of tokens per lane (2 bytes a token; two, because
the next shard is read while the last windows of one are in use), and beside them what its lanes take in
LOOKAHEAD_STEPS steps, one shard's file and tokens per reader thread, and PREFETCH_TOKENS of queued micro
batches (4 bytes a token). With 64 lanes and shards of 4M tokens that is about 0.5 GB on a single rank most of
the time, 1 GB where epochs meet, and an eighth of it on 8 ranks.

Read more than once in an epoch: a shard that a lane boundary cuts is read by both its lanes, unless they are
in it at the same time on one rank: at most K - 1 readings beyond one per shard, of which at most W - 1 are by
a second rank. No rank reads a shard that it takes no window from.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from data_prep.shard_format.manifest import Manifest
from train.data.order import FRAME_TOKENS, DataOrder, Run, check_fit, windows_per_shard
from train.data.packing import cut_windows, document_bounds, frame_windows, permute_documents
from train.data.prefetch import ReadAhead, in_background
from train.data.shard_cache import ShardCache
from train.data.shard_checks import check_shards
from train.data.shards import read_shard, shard_tokens
from train.errors import UserError

PREFETCH_TOKENS = 1 << 20
READER_THREADS = 2
LOOKAHEAD_STEPS = 8


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
        shards: folder or URL of the shards.
        verify: "size" compares file sizes at the start, "full" also sha256 (of this rank's share of the shards, see
            check_shards). Each reading compares both.
        check_at_start: False where another loader has just checked the same shards.
        pin_memory: page-locked micro batches, for copies to the current CUDA device that do not wait.
        cache_dir: folder in which shards that are not local are kept; None reads them anew each time.
    Raises:
        UserError: a shard is missing, truncated or altered; fewer windows than a global batch; a world size
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
        lanes: int,
        rank: int = 0,
        world_size: int = 1,
        verify: str = "size",
        cache_dir: str | None = None,
        pin_memory: bool = False,
        check_at_start: bool = True,
    ) -> None:
        check_fit(global_batch_size, lanes, world_size, micro_batch_size)
        infos = manifest.splits[split]
        windows = windows_per_shard([shard.tokens for shard in infos], sequence_length)
        self.order = DataOrder(windows, global_batch_size, seed, lanes)
        self.steps_per_epoch = self.order.steps_per_epoch
        assert 0 <= rank < world_size
        self._rank, self._world_size = rank, world_size
        self._cache = ShardCache(cache_dir) if cache_dir is not None else None
        if check_at_start:
            check_shards(
                shards, manifest, verify, splits=(split,), rank=rank, world_size=world_size, cache=self._cache
            )
        self._shards, self._infos, self._tokenizer = shards, infos, manifest.tokenizer
        self._pin_memory = pin_memory
        self._sequence_length = sequence_length
        self._micro_batch_size = micro_batch_size

    def batches(self, start_step: int, stop_step: int) -> Iterator[MicroBatch]:
        """The micro batches of steps start_step to stop_step - 1, read ahead in the background.

        The threads end when the iterator does, also when it is closed or dropped early. What fails in them is
        raised here. Each call opens its shards anew: call it once for a run, not once for a step.
        """
        self.order.position(start_step)  # refuses a negative step before a thread starts
        depth = max(2, PREFETCH_TOKENS // (self._micro_batch_size * self._sequence_length))
        # A thread starts on device 0; page-locking there would make a context on it for every rank.
        device = torch.cuda.current_device() if self._pin_memory else None
        return in_background(lambda left: self._produce(start_step, stop_step, device, left), depth)

    def _produce(
        self, start_step: int, stop_step: int, device: int | None, left: threading.Event
    ) -> Iterator[MicroBatch]:
        if device is not None:
            torch.cuda.set_device(device)
        planned: deque[list[list[Run]]] = deque()
        with ReadAhead(self._prepare, READER_THREADS) as shards:
            for ahead in range(start_step, stop_step + LOOKAHEAD_STEPS):
                if ahead < stop_step:
                    planned.append(
                        self.order.micro_batches(ahead, self._rank, self._world_size, self._micro_batch_size)
                    )
                    epoch, _ = self.order.position(ahead)
                    for run in itertools.chain(*planned[-1]):
                        shards.request((epoch, run.shard), ahead)
                step = ahead - LOOKAHEAD_STEPS
                if step >= start_step:
                    for micro_step, runs in enumerate(planned.popleft()):
                        yield self._micro_batch(step, micro_step, runs, shards, left)
                    shards.forget(step)

    def _micro_batch(
        self, step: int, micro_step: int, runs: list[Run], shards: _Shards, left: threading.Event
    ) -> MicroBatch:
        epoch, _ = self.order.position(step)
        rows, length, pin = self._micro_batch_size, self._sequence_length, self._pin_memory
        input_ids = torch.empty((rows, length), dtype=torch.int32, pin_memory=pin)
        window_ids = torch.empty(rows, dtype=torch.int64, pin_memory=pin)
        tokens, ids, row = input_ids.numpy(), window_ids.numpy(), 0
        for run in runs:
            shard = shards.get((epoch, run.shard), left)
            chosen = shard.order[run.first : run.first + run.length]
            out = slice(row, row + run.length)
            frame_windows(shard.windows[chosen], tokens[out], self._tokenizer.cls_id, self._tokenizer.sep_id)
            ids[out] = chosen + self.order.first_window_id(run.shard)
            row += run.length
        return MicroBatch(step, epoch, micro_step, input_ids, window_ids)

    def _prepare(self, key: tuple[int, int]) -> _EpochShard:
        epoch, shard = key
        info = self._infos[shard]
        data = read_shard(self._shards, info, cache=self._cache)
        tokens = shard_tokens(data, info, self._tokenizer)
        del data
        bounds = document_bounds(tokens, self._tokenizer.sep_id)
        documents = self.order.document_permutation(epoch, shard, len(bounds) - 1)
        permuted = permute_documents(tokens, bounds, documents)
        windows = cut_windows(permuted, self._sequence_length - FRAME_TOKENS)
        return _EpochShard(windows, self.order.window_permutation(epoch, shard))


def heldout_windows(
    shards: str,
    manifest: Manifest,
    sequence_length: int,
    max_windows: int,
    *,
    cache_dir: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fixed windows for evaluation, spread evenly over the held-out split: documents in their stored order.

    Args:
        cache_dir: as in BatchLoader.
    Returns:
        input_ids (N, sequence_length) int32, window_ids (N,) int64, N = min(max_windows, windows there are).
    Raises:
        UserError: the held-out split has no window of this length, or a shard is bad.
    """
    infos = manifest.splits["heldout"]
    windows = windows_per_shard([shard.tokens for shard in infos], sequence_length)
    total = sum(windows)
    if total == 0 or max_windows < 1:
        raise UserError(
            f"the held-out split has {total} windows of {sequence_length} tokens, {max_windows} are wanted: "
            "write shards with a larger held-out share, or turn evaluation off"
        )
    count = min(max_windows, total)
    ids = np.arange(count, dtype=np.int64) * total // count
    tokens = np.empty((count, sequence_length), dtype=np.int32)
    cache = ShardCache(cache_dir) if cache_dir is not None else None
    first = 0
    for info, number in zip(infos, windows, strict=True):
        start, stop = np.searchsorted(ids, (first, first + number))
        if start < stop:
            content = shard_tokens(read_shard(shards, info, cache=cache), info, manifest.tokenizer)
            chosen = cut_windows(content, sequence_length - FRAME_TOKENS)[ids[start:stop] - first]
            frame_windows(chosen, tokens[start:stop], manifest.tokenizer.cls_id, manifest.tokenizer.sep_id)
        first += number
    return torch.from_numpy(tokens), torch.from_numpy(ids)


@dataclass(frozen=True)
class _EpochShard:
    windows: np.ndarray
    """(windows, content) token ids, cut from the shard's documents in the epoch's order."""
    order: np.ndarray
    """(windows,) int64: window index by place."""


_Shards = ReadAhead[tuple[int, int], _EpochShard]
