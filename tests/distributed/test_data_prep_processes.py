"""write_shards on several processes, killed and continued: always the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import WORDS
from tests.distributed.data_prep_runs import (
    command,
    contents,
    count,
    kill_one_worker,
    kill_when,
    one_process,
    run,
    write_corpus,
    write_faulty_corpus,
)
from tests.paths import ROOT


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", WORDS)


@pytest.fixture(scope="module")
def expected(
    corpus: Path, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    made = one_process(corpus, tokenizer_folder, tmp_path_factory.mktemp("one") / "out")
    assert len([name for name in made if name.startswith("train-")]) > 5
    return made


def test_more_processes_give_the_same_bytes(
    tmp_path: Path, corpus: Path, tokenizer_folder: str, expected: dict[str, bytes]
) -> None:
    arguments = command(corpus, tokenizer_folder, tmp_path / "out", "--processes", "3")
    done = run(arguments)
    assert contents(tmp_path / "out") == expected
    assert "tokens/s" in done.stderr
    assert "50 duplicates" in done.stdout


def test_killed_three_times_gives_the_same_bytes(
    tmp_path: Path, corpus: Path, tokenizer_folder: str, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    arguments = command(corpus, tokenizer_folder, out, "--processes", "2")
    kill_when(arguments, lambda: count(out, ".work/run-*/*.bucket") > 0)
    kill_when(arguments, lambda: count(out, ".work/buckets/*.bucket") > 1)
    kill_when(arguments, lambda: count(out, "train-*.tar") > 1)
    assert not (out / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    run(arguments)
    assert contents(out) == expected
    assert len(finished) > 1
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items()), "not made again"


def test_a_lost_worker_is_one_message_and_nothing_is_lost(
    tmp_path: Path, corpus: Path, tokenizer_folder: str, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    arguments = command(corpus, tokenizer_folder, out, "--processes", "2")
    code, errors, _ = kill_one_worker(
        arguments, corpus, out, lambda words: "resource_tracker" not in " ".join(words)
    )
    assert code == 1, errors
    assert "a worker process ended unexpectedly (exit code -9); run the same command again" in errors
    assert "Traceback" not in errors
    run(arguments)
    assert contents(out) == expected


def test_a_lost_worker_of_train_tokenizer_is_one_message(tmp_path: Path) -> None:
    """Documentation is parsed by workers; one of them is killed as it starts."""
    words = ["installed-docs", "--vocab-size", "2000", "--out", str(tmp_path / "out"), "--processes", "2"]
    script = str(ROOT / "data_prep" / "train_tokenizer.py")
    with subprocess.Popen([sys.executable, script, *words], stderr=subprocess.PIPE, text=True) as process:
        workers: list[psutil.Process] = []
        while not workers:
            assert process.poll() is None
            children = psutil.Process(process.pid).children()
            workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        workers[0].kill()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert (
        "train_tokenizer: a worker process ended unexpectedly (exit code -9); run the same command again"
        in errors
    )
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_a_failing_worker_is_one_message(tmp_path: Path, tokenizer_folder: str) -> None:
    message = write_faulty_corpus(tmp_path, 40_000)
    done = run(command(tmp_path, tokenizer_folder, tmp_path / "out", "--processes", "2"), exit_code=2)
    printed = [line for line in done.stderr.splitlines() if "write_shards:" in line]
    assert len(printed) == 1
    assert message in printed[0]
