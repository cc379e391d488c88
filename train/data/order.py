"""Which window of the corpus is row i of global step s: pure arithmetic, no reading.

An epoch's window order is the shards, permuted for the epoch, end to end; within a shard the windows are
permuted for the epoch (and so, in packing.py, are the documents that the windows are cut from). The order
is cut into K equal contiguous lanes. Each step takes `global_batch_size / K` windows from every lane, and a
global batch is the lanes' windows in lane order. Rank r of W serves lanes r*K/W to (r+1)*K/W, so that a
batch is the same for every world size that divides K, and a restart needs one integer.

Every permutation comes from a counter-based generator (Philox, Salmon et al. 2011) keyed by seed, purpose,
epoch and shard: any step of any epoch is found without walking through the ones before it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from train.errors import UserError

FRAME_TOKENS = 2  # [CLS] before and [SEP] after the content of a window

# Purposes of the permutations, so that no two share random bits. Changing one changes every order.
_SHARDS, _DOCUMENTS, _WINDOWS = 1, 2, 3
_STEPS = 2**63


class TooFewWindowsError(UserError):
    """The shards do not fill one global batch."""


class Run(NamedTuple):
    """Consecutive places in one shard's window permutation of an epoch."""

    shard: int
    """Index of the shard in the manifest's list."""
    first: int
    """First place in the shard's window permutation."""
    length: int
    """Number of places, at least 1."""


def windows_per_shard(tokens: Sequence[int], sequence_length: int) -> tuple[int, ...]:
    """Whole windows in shards of `tokens` tokens (separators included) each; remainders are dropped."""
    content = sequence_length - FRAME_TOKENS
    if content < 1:
        raise UserError(
            f"data.sequence_length is {sequence_length}: [CLS] and [SEP] leave no room, use at least 3"
        )
    return tuple(count // content for count in tokens)


def num_lanes(global_batch_size: int, lanes: int) -> int:
    """K, the largest divisor of the global batch not above `lanes`: recipe numbers alone decide it."""
    if global_batch_size < 1 or lanes < 1:
        raise UserError(
            f"training.global_batch_size is {global_batch_size} and lanes is {lanes}: both must be at least 1"
        )
    return max(k for k in range(1, min(lanes, global_batch_size) + 1) if global_batch_size % k == 0)


def fitting_world_sizes(global_batch_size: int, lanes: int, micro_batch_size: int | None = None) -> list[int]:
    """World sizes, ascending, that can serve the global batch: divisors of the number of lanes, and with
    `micro_batch_size` only those at which it divides a rank's share of the batch."""
    k = num_lanes(global_batch_size, lanes)
    micro = micro_batch_size or 1
    return [w for w in range(1, k + 1) if k % w == 0 and (global_batch_size // w) % micro == 0]


def fitting_micro_batches(global_batch_size: int, lanes: int, world_size: int) -> list[int]:
    """Micro batches, ascending, with which `world_size` ranks serve the global batch; none if they cannot."""
    if world_size not in fitting_world_sizes(global_batch_size, lanes):
        return []
    share = global_batch_size // world_size
    return [size for size in range(1, share + 1) if share % size == 0]


def largest_micro_batch(global_batch_size: int, lanes: int, world_size: int, at_most: int) -> int | None:
    """The largest of `fitting_micro_batches` up to `at_most`; None where there is none."""
    fitting = fitting_micro_batches(global_batch_size, lanes, world_size)
    return max((size for size in fitting if size <= at_most), default=None)


def check_fit(global_batch_size: int, lanes: int, world_size: int, micro_batch_size: int) -> int:
    """Gradient accumulation steps per global step; UserError, with those that fit, for a world size that does not."""
    if micro_batch_size < 1:
        raise UserError(f"training.micro_batch_size is {micro_batch_size}: it must be at least 1")
    fitting = fitting_world_sizes(global_batch_size, lanes, micro_batch_size)
    if world_size not in fitting:
        remedy = (
            f"use a world size of {', '.join(map(str, fitting))}"
            if fitting
            else "no world size fits: choose a micro batch that divides the global batch"
        )
        k = num_lanes(global_batch_size, lanes)
        if world_size > 0 and k % world_size and global_batch_size % (world_size * micro_batch_size) == 0:
            remedy += f", or data.lanes={world_size}, which changes the order of the data"
        elif smaller := largest_micro_batch(global_batch_size, lanes, world_size, micro_batch_size):
            example = f"give training.micro_batch_size={smaller}"
            remedy = f"{example}, or {remedy}" if fitting else f"{remedy}: {example}"
        elif world_size > k:
            remedy += f"; more ranks than {k} need a larger data.lanes that divides the global batch"
        raise UserError(
            f"a world size of {world_size} does not fit training.global_batch_size {global_batch_size}, "
            f"training.micro_batch_size {micro_batch_size} and {k} lanes: {remedy}"
        )
    return global_batch_size // (world_size * micro_batch_size)


def permutation(length: int, seed: int, purpose: int, epoch: int, shard: int = 0) -> np.ndarray:
    """(length,) int64, a permutation that depends on the arguments alone, on every machine and numpy version.

    numpy keeps Philox's raw bits stable across versions but not `Generator.permutation`, hence the argsort.
    """
    # Arrays, because numpy takes a list with an entry above 2**63 for doubles.
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, epoch, shard, 0], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=counter).random_raw(length)
    return np.argsort(bits, kind="stable").astype(np.int64, copy=False)


class DataOrder:
    """The order of all steps of all epochs.

    Args:
        windows_per_shard: windows of each shard, in the manifest's order.
        global_batch_size: windows per step.
        seed: 0 <= seed < 2**64.
        lanes: upper bound of the number of lanes, see num_lanes.
    Raises:
        TooFewWindowsError: fewer windows than one global batch.
        UserError: a seed out of range.
    """

    def __init__(
        self, windows_per_shard: Sequence[int], global_batch_size: int, seed: int, lanes: int
    ) -> None:
        if not 0 <= seed < 2**64:
            raise UserError(f"data.seed is {seed}: it must be at least 0 and below 2**64")
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.num_lanes = num_lanes(global_batch_size, lanes)
        self.windows_per_lane_step = global_batch_size // self.num_lanes
        self._windows = np.asarray(windows_per_shard, dtype=np.int64)
        # A window's id is its shard's first id plus its index in the epoch's cut of that shard.
        self._first_id = np.concatenate([[0], np.cumsum(self._windows)])
        self.num_windows = int(self._first_id[-1])
        self.steps_per_epoch = self.num_windows // global_batch_size
        if self.steps_per_epoch == 0:
            raise TooFewWindowsError(
                f"the shards hold {self.num_windows} windows, fewer than one batch of {global_batch_size}: "
                "add text, or lower training.global_batch_size or data.sequence_length"
            )
        # Two epochs are in use at most: the current one and the one that is read ahead. Threads may ask for either.
        self._shard_order = functools.lru_cache(maxsize=2)(self._draw_shard_order)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, step within the epoch) of a global step, both from 0; UserError below 0, and from 2**63 on."""
        if not 0 <= step < _STEPS:
            raise UserError(f"step is {step}: steps count from 0, and end below 2**63")
        return divmod(step, self.steps_per_epoch)

    def runs(self, step: int, lane: int) -> list[Run]:
        """Where a lane's windows of a step lie, in order; their lengths add up to windows_per_lane_step."""
        epoch, step_in_epoch = self.position(step)
        shards, ends = self._shard_order(epoch)
        take = self.windows_per_lane_step
        start = (lane * self.steps_per_epoch + step_in_epoch) * take
        stop = start + take
        runs = []
        index = int(np.searchsorted(ends, start, side="right"))  # skips shards without a window
        while start < stop:
            shard = int(shards[index])
            first = start - int(ends[index] - self._windows[shard])
            count = min(stop, int(ends[index])) - start
            if count:
                runs.append(Run(shard, first, count))
            start += count
            index += 1
        return runs

    def micro_batches(self, step: int, rank: int, world_size: int, micro_batch_size: int) -> list[list[Run]]:
        """A rank's windows of a step, in order, as one list of runs per accumulation step.

        The lengths of each list add up to micro_batch_size; all lists of all ranks in turn are the lanes'
        runs in lane order. `world_size` and `micro_batch_size` must have passed check_fit.
        """
        share = self.num_lanes // world_size
        batches: list[list[Run]] = [[]]
        room = micro_batch_size
        for lane in range(rank * share, (rank + 1) * share):
            for shard, first, length in self.runs(step, lane):
                while length:
                    if room == 0:
                        batches.append([])
                        room = micro_batch_size
                    taken = min(length, room)
                    batches[-1].append(Run(shard, first, taken))
                    first, length, room = first + taken, length - taken, room - taken
        return batches

    def window_ids(self, step: int) -> np.ndarray:
        """(global_batch_size,) int64: the ids of a step's windows, in the order of the global batch."""
        epoch, _ = self.position(step)
        return np.concatenate(
            [
                self.first_window_id(shard) + self.window_permutation(epoch, shard)[first : first + length]
                for lane in range(self.num_lanes)
                for shard, first, length in self.runs(step, lane)
            ]
        )

    def document_permutation(self, epoch: int, shard: int, num_documents: int) -> np.ndarray:
        """(num_documents,) int64: the order in which a shard's documents are concatenated in an epoch."""
        return permutation(num_documents, self.seed, _DOCUMENTS, epoch, shard)

    def window_permutation(self, epoch: int, shard: int) -> np.ndarray:
        """(windows of the shard,) int64: the index in the epoch's cut of the shard, by place."""
        return permutation(int(self._windows[shard]), self.seed, _WINDOWS, epoch, shard)

    def first_window_id(self, shard: int) -> int:
        """Id of a shard's window 0; ids run through the shards in the manifest's order."""
        return int(self._first_id[shard])

    def _draw_shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards in order, and where each one's windows end in the epoch's window order."""
        shards = permutation(len(self._windows), self.seed, _SHARDS, epoch)
        return shards, np.cumsum(self._windows[shards])
