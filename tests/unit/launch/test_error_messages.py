"""One message for one error under srun and on several hosts: the other ranks ask rank 0."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from launch import error_messages as telling
from tests.distributed.harness import srun_variables
from tests.paths import ROOT

CALL = "import os, sys; from launch.error_messages import tell; tell(sys.argv[1], os.environ)"


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (["no shards", "no shards", "no shards"], ["no shards", "", ""]),
        (["no shards", "no teacher", "no shards"], ["no shards", "no teacher", ""]),
    ],
)
def test_the_same_message_is_told_by_rank_0_alone(messages: list[str], told: list[str]) -> None:
    job = os.getpid()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CALL, message],
            cwd=ROOT,
            env={**os.environ, **srun_variables(rank, job)},
            text=True,
            stderr=subprocess.PIPE,
        )
        for rank, message in enumerate(messages)
    ]
    assert [rank.communicate(timeout=30)[1].strip() for rank in ranks] == told


@pytest.mark.parametrize(
    "launcher",
    [{"CROSS_RANK": "0"}, {"TORCHELASTIC_RUN_ID": "none"}, {}],
    ids=["deepspeed", "torchrun", "by hand"],
)
def test_where_no_launcher_ends_the_others_they_ask(launcher: dict[str, str]) -> None:
    """Rank 0 alone on its host, two ranks on another; the port at which they met is taken, as by rank 0's store."""
    store = socket.create_server(("127.0.0.1", 0))
    port = store.getsockname()[1]
    variables = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **launcher}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CALL, "no shards"],
            cwd=ROOT,
            env={**os.environ, **variables, "RANK": rank, "LOCAL_RANK": local, "LOCAL_SIZE": size},
            text=True,
            stderr=subprocess.PIPE,
        )
        for rank, local, size in (("0", "0", "1"), ("1", "0", "2"), ("2", "1", "2"))
    ]
    begun = time.monotonic()
    with store:
        assert [rank.communicate(timeout=30)[1].strip() for rank in ranks] == ["no shards", "", ""]
    assert time.monotonic() - begun < telling.SECONDS_FOR_RANK_0


def test_rank_0_whose_others_know_waits_for_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    begun = time.monotonic()
    telling.tell("rank 1 is lost", srun_variables(0, os.getpid() + 3), others_know=True)
    assert time.monotonic() - begun < 2
    assert capsys.readouterr().err == "rank 1 is lost\n"


def test_a_rank_that_failed_alone_tells_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(telling, "SECONDS_FOR_RANK_0", 0.3)
    telling.tell("no GPU here", srun_variables(1, os.getpid() + 1))
    assert capsys.readouterr().err == "no GPU here\n"


def test_rank_0_does_not_wait_for_ranks_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "SECONDS_FOR_RANK_0", 0.3)
    begun = time.monotonic()
    telling.tell("no shards", srun_variables(0, os.getpid() + 2))
    telling.tell("no shards", {})
    assert time.monotonic() - begun < 2
