"""Three ranks, one of which is killed: one message from one of the other two, and an end within seconds."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.forked import Forked
from tests.distributed.harness import rank_environment, srun_variables
from tests.distributed.workers_heartbeat import (
    beat,
    beat_without_a_reader,
    die_before_connecting,
    fail,
    freeze_at_start,
    lose_rank_0_at_start,
)
from train.distributed.heartbeat import FAILED, _Watch
from train.distributed.rendezvous import free_port

BEAT_S = 1.0


@pytest.mark.parametrize(
    ("victim", "speakers", "message"),
    [
        (0, {1, 2}, "lost rank 0"),  # on several hosts no launcher ends the other one
        (1, {0}, "rank 0 lost the connection to rank 1 on "),
    ],
)
def test_one_of_the_surviving_ranks_tells(
    tmp_path: Path, victim: int, speakers: set[int], message: str
) -> None:
    port = free_port()
    (tmp_path / ".lost-rank-0-of-an-earlier-job").touch()
    ranks = [Forked(beat, tmp_path, environment=rank_environment(rank, 3, port)) for rank in range(3)]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 3:
        assert time.monotonic() < deadline, [rank.poll() for rank in ranks]
        time.sleep(0.02)
    ranks[victim].kill()
    killed = time.monotonic()
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    took = time.monotonic() - killed
    told = {rank for rank, output in enumerate(outputs) if "error: " in output}
    assert len(told) == 1, outputs
    assert told <= speakers, outputs
    (said,) = [output for output in outputs if output]
    assert said.count("\n") == 1, said
    assert message in said.replace("the connection to rank 0", "rank 0"), said
    assert [rank.returncode for rank in ranks if rank is not ranks[victim]] == [1, 1]
    print(f"rank {victim} killed: the others ended within {took:.1f} s")
    assert took < 20
    assert not (tmp_path / ".lost-rank-0-of-an-earlier-job").exists()


@pytest.mark.parametrize(("failing", "speaker"), [((0, 1, 2), 0), ((1,), 1)], ids=["all", "one"])
def test_an_error_is_told_once(tmp_path: Path, failing: tuple[int, ...], speaker: int) -> None:
    """Under srun, which ends nobody: by rank 0 what all meet, by another rank what it alone meets."""
    port, job = free_port(), os.getpid()
    ranks = [
        Forked(
            fail,
            tmp_path,
            failing,
            environment={**rank_environment(rank, 3, port), **srun_variables(rank, job)},
        )
        for rank in range(3)
    ]
    begun = time.monotonic()
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    expected = ["", "", ""]
    expected[speaker] = "error: this teacher has no head\n"
    assert outputs == expected
    assert [rank.returncode for rank in ranks] == [2 if rank in failing else 1 for rank in range(3)]
    assert time.monotonic() - begun < (8 if len(failing) == 3 else 30)


def test_rank_0_that_dies_at_the_start_is_not_waited_for(tmp_path: Path) -> None:
    port = free_port()
    ranks = [
        Forked(lose_rank_0_at_start, tmp_path, environment=rank_environment(rank, 3, port))
        for rank in range(3)
    ]
    outputs = [rank.communicate(timeout=40)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [-9, 1, 1], outputs
    for output in outputs[1:]:
        assert re.search(
            r"error: rank [12] on \S+ lost another rank while the job started \(.+\); run again\n$", output
        )


def test_a_rank_that_freezes_at_the_start_is_named(tmp_path: Path) -> None:
    port = free_port()
    ranks = [
        Forked(freeze_at_start, tmp_path, environment=rank_environment(rank, 3, port)) for rank in range(3)
    ]
    outputs = [ranks[rank].communicate(timeout=60)[0] for rank in (0, 2)]
    ranks[1].kill()
    assert [ranks[rank].returncode for rank in (0, 2)] == [1, 1]
    told = "error: rank 1 came, but did not follow within 3 s while the job started"
    assert told in outputs[0]


def test_a_rank_that_dies_before_the_ranks_connect_is_not_waited_for() -> None:
    port = free_port()
    ranks = [Forked(die_before_connecting, environment=rank_environment(rank, 2, port)) for rank in range(2)]
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, -9]
    assert re.search(r"error: rank 0 on \S+ lost another rank while the job started \(", outputs[0]), outputs


def test_the_job_ends_although_nobody_reads_what_it_says(tmp_path: Path) -> None:
    """A heart whose thread died of its own message would leave its main thread in the collective."""
    port = free_port()
    ranks = [
        Forked(beat_without_a_reader, tmp_path, environment=rank_environment(rank, 2, port))
        for rank in range(2)
    ]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline, [rank.poll() for rank in ranks]
        time.sleep(0.02)
    ranks[1].send_signal(signal.SIGSTOP)
    try:
        ranks[0].communicate(timeout=40)
    finally:
        ranks[1].kill()
    assert ranks[0].returncode == 1


class Clock:
    """Stands in for the time module of train/distributed/heartbeat.py."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("train.distributed.heartbeat.time", clock)
    return clock


def look(watch: _Watch, clock: Clock, seconds: int, *hearts: tuple[str, str] | None) -> None:
    """A look a second: each rank's count and place, or a beating heart in one place where there is None."""
    for second in range(seconds):
        clock.now += 1
        own = [(heart or (f"{clock.now}", "forward")) for heart in hearts]
        watch.look([(count, f"node{rank}", place) for rank, (count, place) in enumerate(own)])
        assert second == seconds - 1 or watch.fault(10, 60) is None


def test_a_heart_that_stands_still_is_lost(clock: Clock) -> None:
    watch = _Watch(2)
    look(watch, clock, 11, None, ("1", "backward"))
    assert watch.fault(10, 60) is None
    look(watch, clock, 1, None, ("1", "backward"))
    assert watch.fault(10, 60) == (
        "rank 1 on node1 has not been heard of for 11 s, last in backward: it was killed, is frozen or is cut off"
    )


def test_ranks_that_all_stay_in_their_places_are_stuck(clock: Clock) -> None:
    watch = _Watch(2)
    for _ in range(61):
        assert watch.fault(10, 60) is None
        look(watch, clock, 1, None, (f"{clock.now}", "all-reduce"))
    look(watch, clock, 1, None, (f"{clock.now}", "all-reduce"))
    assert str(watch.fault(10, 60)).startswith(
        "no rank has moved on for 60 s: rank 0 in forward, rank 1 in all-reduce"
    )


def test_a_rank_that_failed_is_not_lost_and_given_time(clock: Clock) -> None:
    watch = _Watch(2)
    for second in range(20):
        look(watch, clock, 1, None, (FAILED, "forward"))
        assert watch.fault(10, 60) is None
        assert watch.failed(15) == (second > 15)


def test_a_suspended_job_goes_on(clock: Clock) -> None:
    """Rank 0 wakes first, a few seconds before the others."""
    watch = _Watch(2)
    look(watch, clock, 3, None, ("3", "forward"))
    clock.now += 3_600
    look(watch, clock, 4, ("4", "forward"), ("3", "forward"))
    assert watch.fault(10, 60) is None
    look(watch, clock, 1, ("5", "forward"), ("4", "forward"))
    assert watch.fault(10, 60) is None
