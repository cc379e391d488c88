"""What the tests of several processes and of MPI ranks share: a corpus, a command, a comparison."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.paths import ROOT

SCRIPT = str(ROOT / "data_prep" / "write_shards.py")


def write_corpus(folder: Path, words: list[str]) -> Path:
    """Ten MB of JSON lines in one file and some in small ones: chunks to share, and units to deal out."""
    folder.mkdir()
    rng = random.Random(7)
    texts = [" ".join(rng.choices(words, k=rng.randint(10, 500))) for _ in range(6600)]
    texts += texts[:50]
    (folder / "large.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for number in range(5):
        (folder / f"small-{number}.txt").write_text(" ".join(rng.choices(words, k=200)))
    return folder


def command(corpus: Path, tokenizer: str, out: Path, *options: str) -> list[str]:
    shape = ["--heldout-fraction", "0.05", "--shard-tokens", "100000"]
    return [
        sys.executable,
        SCRIPT,
        str(corpus),
        "--tokenizer",
        tokenizer,
        "--out",
        str(out),
        *shape,
        *options,
    ]


def write_faulty_corpus(folder: Path, repeats: int) -> str:
    """Eight files of `repeats` sentences, one of which ends with a byte that is no UTF-8; what is said of it."""
    for number in range(8):
        fault = b"\xff" if number == 4 else b""
        (folder / f"{number}.txt").write_bytes(b"the model reads " * repeats + fault)
    return f"4.txt: invalid UTF-8 (byte 0xff at offset {16 * repeats})"


def run(
    arguments: list[str], exit_code: int = 0, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run to the end, which must be `exit_code` and without a traceback."""
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def one_process(corpus: Path, tokenizer: str, out: Path) -> dict[str, bytes]:
    """What one process makes in one go: what all others must make."""
    run(command(corpus, tokenizer, out, "--processes", "1"))
    return contents(out)


def kill_one_worker(
    arguments: list[str],
    corpus: Path,
    out: Path,
    is_worker: Callable[[list[str]], bool],
    env: dict[str, str] | None = None,
) -> tuple[int, str, list[psutil.Process]]:
    """Start the command, kill -9 a worker that reads `corpus` once there is a bucket; exit code, errors, all workers.

    Another one may still be starting, and end without being missed, when the work is done.
    """
    with subprocess.Popen(
        arguments, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        workers: list[psutil.Process] = []
        reading: list[psutil.Process] = []
        while not (reading and count(out, ".work/buckets/*.bucket")):
            assert process.poll() is None, (
                f"it ended before a worker could be killed:\n{process.communicate()[1]}"
            )
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children(recursive=True)
                workers = [child for child in children if is_worker(child.cmdline())]
                reading = [
                    each
                    for each in workers
                    if any(corpus in Path(file.path).parents for file in each.open_files())
                ]
        reading[0].kill()
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors, workers


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def kill_when(arguments: list[str], ready: Callable[[], bool], timeout_s: float = 90) -> None:
    """Start the command in a process group of its own, and kill -9 all of it as soon as `ready()`."""
    with subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + timeout_s
        while not ready():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, 9)


def count(folder: Path, pattern: str) -> int:
    return len(list(folder.glob(pattern)))
