"""Ranks that are killed, freeze, hang or fail: one message by name, and an end within seconds."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks.forked import Forked
from tests.distributed.ranks.harness import rank_environment, srun_variables
from tests.distributed.workers.heartbeat import (
    communicate,
    communicate_without_a_reader,
    die_before_connecting,
    end_at_start,
    fail,
    hang,
)
from train.distributed.heartbeat import Beat, Watch
from train.distributed.rendezvous import free_port
from train.errors import UserError


def start(count: int, worker: Callable[..., None], *args: Any, srun: bool = False) -> list[Forked]:
    """Ranks that no launcher ends."""
    port, job = free_port(), os.getpid()

    def environment(rank: int) -> Mapping[str, str]:
        return {**rank_environment(rank, count, port), **(srun_variables(rank, job) if srun else {})}

    return [Forked(worker, *args, environment=environment(rank)) for rank in range(count)]


def outputs_of(ranks: list[Forked], *victims: int) -> list[str]:
    """What the others have said, once they have ended; the victims are killed then."""
    outputs = [rank.communicate(timeout=60)[0] for number, rank in enumerate(ranks) if number not in victims]
    for number in victims:
        ranks[number].kill()
    return outputs


def wait_until_ready(folder: Path, ranks: list[Forked]) -> float:
    deadline = time.monotonic() + 60
    while len(list(folder.glob("ready-*"))) < len(ranks):
        assert time.monotonic() < deadline, [rank.poll() for rank in ranks]
        time.sleep(0.02)
    return time.monotonic()


@pytest.mark.parametrize(
    ("number", "victim", "message", "seconds"),
    [
        (signal.SIGKILL, 0, r"rank [12] on \S+ lost the connection to rank 0, which ended", 5),
        (signal.SIGKILL, 1, r"rank [02] on \S+ lost the connection to rank 1 on \S+, which ended", 10),
        (signal.SIGSTOP, 0, r"rank [12] on \S+ has had no answer from rank 0 for [67] s", 12),
        (
            signal.SIGSTOP,
            1,
            r"rank 1 on \S+ has not been heard of for [67] s, last in here: it was killed",
            14,
        ),
    ],
)
def test_a_lost_rank_is_named(tmp_path: Path, number: int, victim: int, message: str, seconds: float) -> None:
    ranks = start(3, communicate, tmp_path)
    begun = wait_until_ready(tmp_path, ranks)
    ranks[victim].send_signal(number)
    outputs = outputs_of(ranks, victim)
    took = time.monotonic() - begun
    print(f"rank {victim}, {signal.Signals(number).name}: the others ended within {took:.1f} s")
    lines = [line for output in outputs for line in output.splitlines()]
    # Where rank 0 is lost, nobody counts the reports.
    assert len(lines) == 1 or (victim == 0 and len(lines) == 2), outputs
    for line in lines:
        assert re.match(rf"error: {message}", line), outputs
        assert "go on from the newest checkpoint" in line
    assert [rank.returncode for rank in ranks if rank is not ranks[victim]] == [1, 1]
    assert took < seconds


def test_a_job_that_hangs_says_where() -> None:
    ranks = start(2, hang)
    begun = time.monotonic()
    output = "".join(outputs_of(ranks))
    expected = r"error: no rank has moved on for 8 s: rank 0 in here, rank 1 in here; [^\n]+\n"
    assert re.fullmatch(expected, output), output
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert time.monotonic() - begun < 40


@pytest.mark.parametrize("srun", [False, True])
@pytest.mark.parametrize("failing", [(0, 1, 2), (1,), (0,)], ids=["all", "rank 1", "rank 0"])
def test_an_error_of_the_users_is_reported_once(failing: tuple[int, ...], srun: bool) -> None:
    """Under srun and by hand, where nobody ends the others."""
    ranks = start(3, fail, failing, UserError("this teacher has no head"), srun=srun)
    begun = time.monotonic()
    outputs = outputs_of(ranks)
    assert "".join(outputs) == "error: this teacher has no head\n"
    assert [rank.returncode for rank in ranks] == [2 if rank in failing else 1 for rank in range(3)]
    assert time.monotonic() - begun < 30


def test_a_defect_keeps_its_traceback() -> None:
    ranks = start(3, fail, (0, 1, 2), ValueError("shape mismatch"))
    output = "".join(outputs_of(ranks))
    assert output.count("Traceback (most recent call last)") == 1, output
    assert output.count("ValueError: shape mismatch\n") == 1
    assert [rank.returncode for rank in ranks] == [1, 1, 1]


def test_rank_0_that_dies_at_the_start_is_not_waited_for() -> None:
    ranks = start(3, end_at_start, 0, signal.SIGKILL)
    outputs = outputs_of(ranks, 0)
    assert [rank.returncode for rank in ranks] == [-9, 1, 1], outputs
    for output in outputs:
        assert re.fullmatch(
            r"error: rank [12] on \S+ lost rank 0 while the job started \(.+\); run again\n", output
        ), output


def test_a_rank_that_freezes_at_the_start_is_named() -> None:
    ranks = start(3, end_at_start, 1, signal.SIGSTOP)
    output = "".join(outputs_of(ranks, 1))
    assert re.match(
        r"error: rank 1 on \S+ has not been heard of for 6 s, last in the start of the job: ", output
    ), output
    assert output.count("\n") == 1
    assert [ranks[rank].returncode for rank in (0, 2)] == [1, 1]


def test_a_rank_that_dies_before_the_ranks_connect_is_not_waited_for() -> None:
    ranks = start(2, die_before_connecting)
    (output,) = outputs_of(ranks, 1)
    assert [rank.returncode for rank in ranks] == [1, -9]
    assert re.match(r"error: rank 0 on \S+ lost another rank while the job started \(", output), output


def test_the_job_ends_although_nobody_reads_what_it_says(tmp_path: Path) -> None:
    """A heartbeat thread that died of its own message would leave its main thread in the collective."""
    ranks = start(2, communicate_without_a_reader, tmp_path)
    wait_until_ready(tmp_path, ranks)
    ranks[1].send_signal(signal.SIGSTOP)
    outputs_of(ranks, 1)
    assert ranks[0].returncode == 1


def look(watch: Watch, seconds: int, *beats: tuple[str, str] | None) -> None:
    """A look a second: each rank's count and place, or of one that is alive in one place where there is None."""
    for _ in range(seconds):
        look.count += 1  # type: ignore[attr-defined]
        own = [beat or (f"{look.count}", "forward") for beat in beats]  # type: ignore[attr-defined]
        watch.look([Beat(count, f"node{rank}", place) for rank, (count, place) in enumerate(own)])


look.count = 0  # type: ignore[attr-defined]


def test_a_count_that_stands_still_is_a_lost_rank() -> None:
    watch = Watch(2)
    look(watch, 11, None, ("1", "backward"))
    assert watch.fault(10, 60) is None
    look(watch, 1, None, ("1", "backward"))
    assert watch.fault(10, 60) == (
        "rank 1 on node1 has not been heard of for 11 s, last in backward: it was killed, is frozen or is cut off"
    )


def test_ranks_that_all_stay_in_their_places_are_stuck() -> None:
    watch = Watch(2)
    for number in range(61):
        look(watch, 1, None, (f"{number}", "all-reduce"))
        assert watch.fault(10, 60) is None
    look(watch, 1, None, ("61", "all-reduce"))
    assert str(watch.fault(10, 60)).startswith(
        "no rank has moved on for 60 s: rank 0 in forward, rank 1 in all-reduce"
    )
    look(watch, 1, None, ("62", "backward"))
    assert watch.fault(10, 60) is None
