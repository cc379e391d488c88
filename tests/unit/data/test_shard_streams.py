"""Commands that shards come through: none outlives its reader, whatever it does and however the reader ends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.tiny_shards import write_tiny_shards
from train.data import shard_streams
from train.data.loader import BatchLoader
from train.data.shard_checks import check_shards
from train.data.shard_reader import read_shard
from train.data.shard_streams import Readings


def hanging(folder: Path, words: str = "") -> str:
    """A command that says who it and its child are, then hangs; what follows it is a comment."""
    return f"{words} trap '' TERM; echo $$ >> {folder}/ids; sleep 600 & echo $! >> {folder}/ids; wait #"


def left_of(folder: Path, count: int = 2) -> list[int]:
    """The processes that `hanging` told of and that still run, after a moment for them to end."""
    path = folder / "ids"
    wait_for(lambda: path.exists() and len(path.read_text().split()) >= count)
    ids = [int(word) for word in path.read_text().split()]
    assert len(ids) >= count
    wait_for(lambda: not any(map(runs, ids)))
    return [number for number in ids if runs(number)]


def runs(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")


def test_a_command_that_stalls_is_an_error_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_streams, "STALL_S", 0.4)
    manifest = write_tiny_shards(tmp_path)
    shard = manifest.splits["train"][0]
    for words in ("", "echo x;"):
        begun = time.monotonic()
        with pytest.raises(
            ValueError, match=r"train-000000\.tar at pipe:.* \(nothing came from it for 0 s\)"
        ):
            read_shard(f"pipe:{hanging(tmp_path, words)}", shard)
        assert time.monotonic() - begun < 4
        assert left_of(tmp_path) == []
    # Everything has come, but the command does not end by itself.
    assert len(Readings().read_up_to(f"pipe:yes & {hanging(tmp_path)}", 10)) > 10
    assert left_of(tmp_path) == []


def test_slow_is_not_stalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_streams, "STALL_S", 0.5)
    assert (
        Readings().read_up_to("pipe:for i in 1 2 3 4 5; do echo $i; sleep 0.2; done #", 99)
        == b"1\n2\n3\n4\n5\n"
    )


def test_a_command_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_tiny_shards(tmp_path).splits["train"][0]
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(
        ValueError, match=r"s3://b/train-000000\.tar cannot be read \(there is no command 'aws'"
    ):
        read_shard("s3://b", shard)


@pytest.mark.parametrize("scheme", ["pipe", "http"])
def test_commands_end_with_the_loader_iterator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """A `pipe:`, and a handler of webdataset's own (curl); the loader is closed while it waits for both."""
    manifest = write_tiny_shards(tmp_path)
    curl = tmp_path / "curl"
    curl.write_text(f"#!/bin/sh\n{hanging(tmp_path)}\n")
    curl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("train.data.shard_checks.check_shard_sizes", lambda *arguments: None)
    location = f"pipe:{hanging(tmp_path)}" if scheme == "pipe" else "http://127.0.0.1:9"
    loader = BatchLoader(
        location, manifest, sequence_length=16, global_batch_size=16, micro_batch_size=2, seed=1, lanes=8
    )
    batches = loader.batches(0, 10)
    consumer = threading.Thread(target=lambda: next(batches, None), daemon=True)
    consumer.start()
    assert wait_for(lambda: (tmp_path / "ids").exists() and len((tmp_path / "ids").read_text().split()) >= 4)
    from train.data.prefetch import _stop_producers  # what the end of the interpreter calls

    begun = time.monotonic()
    _stop_producers()
    assert time.monotonic() - begun < 3
    assert left_of(tmp_path, 4) == []


def test_a_bad_shard_is_told_although_others_hang(tmp_path: Path) -> None:
    """While the sha256s are compared at the start: the error waits for nobody."""
    manifest = write_tiny_shards(tmp_path)
    shards = manifest.splits["train"]
    (tmp_path / "bad").write_bytes(b"short")
    bad = replace(manifest, splits={"train": (replace(shards[0], name="bad"), *shards[1:]), "heldout": ()})
    command = tmp_path / "fetch"
    command.write_text(
        f'#!/bin/sh\n[ "${{1##*/}}" = bad ] && sleep 0.5 && exec cat "$1"\n{hanging(tmp_path)}\n'
    )
    command.chmod(0o755)
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"shard bad at pipe:.* is truncated, 5 of"):
        check_shards(f"pipe:{command} {tmp_path}", bad, "full")
    assert time.monotonic() - begun < 5
    assert left_of(tmp_path) == []


@pytest.mark.parametrize("end", ["sys.exit(0)", "os.kill(os.getpid(), 9)"])
def test_commands_end_with_the_process(tmp_path: Path, end: str) -> None:
    script = f"""
        import os, sys, threading, time
        from pathlib import Path
        from train.data.shard_streams import Readings

        url = sys.argv[1]
        threading.Thread(target=lambda: Readings().read_up_to(url, 10), daemon=True).start()
        while not Path(sys.argv[2]).exists() or len(Path(sys.argv[2]).read_text().split()) < 2:
            time.sleep(0.02)
        {end}
    """
    arguments = [f"pipe:{hanging(tmp_path)}", str(tmp_path / "ids")]
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    subprocess.run(command, cwd=ROOT, check=False, timeout=30, capture_output=True)
    assert left_of(tmp_path) == []


def test_an_interrupt_ends_what_the_main_thread_reads(tmp_path: Path) -> None:
    """Ctrl-C no longer reaches the command itself, which is in a group of its own."""
    script = """
        import signal, sys
        from data_prep.shard_format.manifest import Manifest
        import train.data.shard_streams

        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.7)
        Manifest.load(sys.argv[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), f"pipe:{hanging(tmp_path)}"]
    done = subprocess.run(command, cwd=ROOT, check=False, timeout=30, capture_output=True, text=True)
    assert "KeyboardInterrupt" in done.stderr
    assert left_of(tmp_path) == []
