"""Three ranks, one of which is killed: one message from one of the other two, and an end within seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.harness import ROOT, free_port

BEAT_S = 1.0


def start_rank(rank: int, port: int, folder: Path) -> subprocess.Popen[str]:
    env = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "3",
        "OMP_NUM_THREADS": "1",
    }
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.workers_heartbeat", str(folder)],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


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
    ranks = [start_rank(rank, port, tmp_path) for rank in range(3)]
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
