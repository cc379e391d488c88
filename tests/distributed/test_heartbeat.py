"""Three ranks, one of which is killed: one message from one of the other two, and an end within seconds."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from tests.distributed.forked import Forked
from tests.distributed.harness import free_port, rank_environment, srun_variables
from tests.distributed.workers_heartbeat import beat, fail, lose_rank_0_at_start

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
