"""write_shards on several processes, killed and continued: always the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.conftest import WORDS
from tests.distributed.data_prep_runs import command, contents, count, kill_when, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", WORDS)


@pytest.fixture(scope="module")
def expected(
    corpus: Path, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What one process makes in one go."""
    out = tmp_path_factory.mktemp("one") / "out"
    subprocess.run(
        command(corpus, tokenizer_folder, out, "--processes", "1"), check=True, capture_output=True
    )
    made = contents(out)
    assert len([name for name in made if name.startswith("train-")]) > 5
    return made


def test_more_processes_give_the_same_bytes(
    tmp_path: Path, corpus: Path, tokenizer_folder: str, expected: dict[str, bytes]
) -> None:
    arguments = command(corpus, tokenizer_folder, tmp_path / "out", "--processes", "3")
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == expected
    assert "tokens/s" in done.stderr
    assert "50 duplicates" in done.stdout


def test_killed_three_times_gives_the_same_bytes(
    tmp_path: Path, corpus: Path, tokenizer_folder: str, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    arguments = command(corpus, tokenizer_folder, out, "--processes", "2")
    kill_when(arguments, lambda: count(out, ".work/run-*/*.spill") > 0)
    kill_when(arguments, lambda: count(out, ".work/spills/*.spill") > 1)
    kill_when(arguments, lambda: count(out, "train-*.tar") > 1)
    assert not (out / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(out) == expected
    assert len(finished) > 1
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items()), "not made again"


def test_a_lost_worker_is_one_message_and_nothing_is_lost(
    tmp_path: Path, corpus: Path, tokenizer_folder: str, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    arguments = command(corpus, tokenizer_folder, out, "--processes", "2")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not count(out, ".work/spills/*.spill"):
            assert process.poll() is None
        workers = [
            child
            for child in psutil.Process(process.pid).children()
            if "resource_tracker" not in " ".join(child.cmdline())
        ]
        os.kill(workers[0].pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "a worker process ended unexpectedly (exit code -9); run the same command again" in errors
    assert "Traceback" not in errors
    subprocess.run(arguments, check=True, capture_output=True)
    assert contents(out) == expected


def test_a_failing_worker_is_one_message(tmp_path: Path, tokenizer_folder: str) -> None:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_bytes(
            b"the model reads " * 40_000 + (b"\xff" if number == 4 else b"")
        )
    out = tmp_path / "out"
    done = subprocess.run(
        command(tmp_path, tokenizer_folder, out, "--processes", "2"), capture_output=True, text=True
    )
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if "write_shards:" in line]
    assert len(told) == 1
    assert "4.txt: invalid UTF-8 (byte 0xff at offset 640000)" in told[0]
    assert "Traceback" not in done.stderr
