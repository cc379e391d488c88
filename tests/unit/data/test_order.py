"""The data order against its definition written out, over thousands of random configurations."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.config_sections.data import DataConfig
from train.data import order as order_module
from train.data.order import (
    DataOrder,
    Run,
    check_fit,
    fitting_world_sizes,
    num_lanes,
    permutation,
    windows_per_shard,
)
from train.errors import UserError

WORLD_SIZES = (1, 2, 4, 8)

LANES = DataConfig().lanes


@st.composite
def orders(draw: st.DrawFn) -> DataOrder:
    """Orders that all of WORLD_SIZES fit, with shards of any size, also without a window."""
    lanes = 8 * draw(st.integers(1, 3))
    batch = lanes * draw(st.integers(1, 4))
    windows = draw(st.lists(st.integers(0, 3 * batch), min_size=1, max_size=12))
    windows.append(max(0, batch - sum(windows)) + draw(st.integers(0, batch)))
    return DataOrder(windows, batch, draw(st.integers(0, 2**64 - 1)), lanes)


Place = tuple[int, int]  # shard, place in the shard's window permutation


def places(runs: Iterable[Run]) -> list[Place]:
    return [(run.shard, run.first + offset) for run in runs for offset in range(run.length)]


def global_batch(order: DataOrder, step: int, world_size: int, micro_batch_size: int) -> list[Place]:
    """The windows of a step as the ranks serve them, in rank order."""
    batches = [
        places(runs)
        for rank in range(world_size)
        for runs in order.micro_batches(step, rank, world_size, micro_batch_size)
    ]
    assert {len(batch) for batch in batches} == {micro_batch_size}
    return list(itertools.chain(*batches))


def epoch_by_definition(order: DataOrder, windows: list[int], epoch: int) -> list[list[Place]]:
    """All global batches of an epoch: the whole window order written out, cut into lanes, then into steps."""
    shards = permutation(len(windows), order.seed, 1, epoch)
    line = [(shard, place) for shard in shards.tolist() for place in range(windows[shard])]
    per_lane, take = order.steps_per_epoch * order.windows_per_lane_step, order.windows_per_lane_step
    lanes = [line[lane * per_lane : (lane + 1) * per_lane] for lane in range(order.num_lanes)]
    return [
        [window for lane in lanes for window in lane[step * take : (step + 1) * take]]
        for step in range(order.steps_per_epoch)
    ]


@settings(max_examples=250, deadline=None)
@given(orders(), st.integers(0, 5))
def test_every_step_is_what_the_definition_says(order: DataOrder, epoch: int) -> None:
    windows = np.diff(order._first_id).tolist()
    expected = epoch_by_definition(order, windows, epoch)
    first = epoch * order.steps_per_epoch
    for step in range(order.steps_per_epoch):
        assert global_batch(order, first + step, 1, 1) == expected[step]


@settings(max_examples=400, deadline=None)
@given(orders(), st.integers(0, 2**32))
def test_no_world_size_micro_batch_or_restart_changes_a_batch(order: DataOrder, draw: int) -> None:
    windows = np.diff(order._first_id).tolist()
    choose = random.Random(draw)
    for _ in range(10):  # 4000 configurations in all
        step = choose.randrange(3 * order.steps_per_epoch + 1)
        world_size = choose.choice(WORLD_SIZES)
        share = order.global_batch_size // world_size
        micro = choose.choice([m for m in range(1, share + 1) if share % m == 0])
        # A restarted process has an order of its own, which has not seen the steps before.
        restarted = DataOrder(windows, order.global_batch_size, order.seed, order.num_lanes)
        assert global_batch(restarted, step, world_size, micro) == global_batch(order, step, 1, 1)


@settings(max_examples=300, deadline=None)
@given(orders(), st.integers(0, 3), st.sampled_from(WORLD_SIZES))
def test_every_window_is_used_once_in_an_epoch(order: DataOrder, epoch: int, world_size: int) -> None:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    share = order.global_batch_size // world_size
    used = [place for step in steps for place in global_batch(order, step, world_size, share)]
    assert len(set(used)) == len(used)
    windows = np.diff(order._first_id).tolist()
    assert set(used) <= {(shard, place) for shard, count in enumerate(windows) for place in range(count)}
    assert order.num_windows - len(used) < order.global_batch_size


@settings(max_examples=200, deadline=None)
@given(orders(), st.integers(0, 3), st.sampled_from(WORLD_SIZES))
def test_a_boundary_costs_one_more_reading(order: DataOrder, epoch: int, world_size: int) -> None:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    read = {
        (rank, run.shard)
        for step, rank in itertools.product(steps, range(world_size))
        for runs in order.micro_batches(step, rank, world_size, 1)
        for run in runs
    }
    assert len(read) <= len({shard for _, shard in read}) + world_size - 1
    by_lane = {
        (lane, run.shard)
        for step, lane in itertools.product(steps, range(order.num_lanes))
        for run in order.runs(step, lane)
    }
    assert len(by_lane) <= len({shard for _, shard in by_lane}) + order.num_lanes - 1


def test_epochs_reshuffle_shards_documents_and_windows() -> None:
    order = DataOrder([40] * 50, 64, seed=7, lanes=LANES)
    for draw in (
        lambda epoch: order._shard_order(epoch)[0],
        lambda epoch: order.document_permutation(epoch, 3, 50),
        lambda epoch: order.window_permutation(epoch, 3),
    ):
        first, second = draw(0), draw(1)
        assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(len(first)))
        assert (first != second).mean() > 0.8
    # The three of one epoch, and those of two seeds, are different permutations as well.
    assert (order.document_permutation(0, 3, 40) != order.window_permutation(0, 3)).mean() > 0.8
    assert (order.window_permutation(0, 3) != order.window_permutation(0, 4)).mean() > 0.8
    assert (
        DataOrder([40] * 50, 64, seed=8, lanes=LANES).window_permutation(0, 3)
        != order.window_permutation(0, 3)
    ).any()


def test_a_permutation_is_uniform_and_never_changes() -> None:
    # Philox as numpy keeps it for ever: other numbers here would be another order for every run.
    assert permutation(10, 0, 1, 0).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert permutation(10, 2**64 - 1, 3, 5, 7).tolist() == [2, 4, 5, 8, 7, 0, 9, 3, 6, 1]
    counts = np.zeros((6, 6))
    for seed in range(6000):
        counts[np.arange(6), permutation(6, seed, 2, 0)] += 1
    # 36 cells of mean 1000; chi-square of 25 degrees of freedom is above 52.6 once in a thousand.
    assert ((counts - 1000) ** 2 / 1000).sum() < 52.6


def test_a_late_step_costs_no_more_than_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(
        order_module, "permutation", lambda *arguments: drawn.append(arguments[3]) or permutation(*arguments)
    )
    order = DataOrder([1000] * 100, 4096, seed=0, lanes=LANES)
    late = 10**12 * order.steps_per_epoch + 3
    order.micro_batches(late, 0, 8, 32)
    assert drawn == [10**12]


def test_lanes_are_the_largest_divisor() -> None:
    assert [num_lanes(batch, LANES) for batch in (4096, 48, 100, 97, 1, 130)] == [64, 48, 50, 1, 1, 26]
    assert num_lanes(4096, 8) == 8
    assert fitting_world_sizes(4096, 64) == [1, 2, 4, 8, 16, 32, 64]
    assert fitting_world_sizes(4096, 64, micro_batch_size=128) == [1, 2, 4, 8, 16, 32]
    assert fitting_world_sizes(48, 64) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
    assert check_fit(4096, 64, world_size=8, micro_batch_size=32) == 16
    assert check_fit(4096, 128, world_size=128, micro_batch_size=32) == 1


@pytest.mark.parametrize(
    ("global_batch_size", "lanes", "world_size", "micro_batch_size", "message"),
    [
        (64, 16, 3, 4, r"world size of 3 does not fit .*use a world size of 1, 2, 4, 8, 16$"),
        (64, 16, 0, 4, r"use a world size of 1, 2, 4, 8, 16$"),
        (64, 16, 1, 3, "no world size fits: choose a micro batch that divides the global batch"),
        (64, 16, 1, 0, "micro_batch_size is 0"),
        (4096, 64, 128, 32, r"16, 32, 64, or data\.lanes=128, which changes the order of the data$"),
        (4096, 64, 96, 32, r"32, 64; more ranks than 64 need a larger data\.lanes that divides"),
    ],
)
def test_a_world_size_that_does_not_fit_is_told_which_do(
    global_batch_size: int, lanes: int, world_size: int, micro_batch_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_fit(global_batch_size, lanes, world_size, micro_batch_size)


def test_what_cannot_be_ordered_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hold 7 windows, fewer than one batch of 8: add text, or lower"):
        DataOrder([3, 4], 8, seed=0, lanes=LANES)
    with pytest.raises(ValueError, match=r"hold 0 windows"):
        DataOrder([], 8, seed=0, lanes=LANES)
    with pytest.raises(ValueError, match=r"data\.seed is -1"):
        DataOrder([8], 8, seed=-1, lanes=LANES)
    with pytest.raises(ValueError, match="step is -1"):
        DataOrder([8], 8, seed=0, lanes=LANES).position(-1)
    with pytest.raises(ValueError, match=r"step is 9223372036854775808: .* end below 2\*\*63"):
        DataOrder([8], 8, seed=0, lanes=LANES).runs(2**63, 0)
    assert DataOrder([8], 8, seed=0, lanes=LANES).runs(2**63 - 1, 0)
    with pytest.raises(ValueError, match=r"data\.sequence_length is 2"):
        windows_per_shard([100], 2)
    with pytest.raises(ValueError, match="must be at least 1"):
        num_lanes(0, LANES)
    assert windows_per_shard([100, 13, 0], 12) == (10, 1, 0)
