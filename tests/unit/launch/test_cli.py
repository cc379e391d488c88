"""How errors reach the user, and what the small commands refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch import quickstart, report
from launch.cli import run_main
from tests.paths import ROOT
from train.errors import LostRankError


def raising(error: BaseException) -> int:
    def main(arguments: Sequence[str]) -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no such key"), 2),
        (FileNotFoundError("no such file"), 2),
        (OSError(28, "No space left on device"), 1),
        (LostRankError("rank 1 is lost"), 1),
    ],
)
def test_one_plain_message_and_the_code(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HALFLING_TRACEBACK", raising=False)
    assert raising(error) == code
    printed = capsys.readouterr()
    assert printed.err == f"error: {error}\n"
    assert printed.out == ""


def test_help_that_nobody_reads_and_a_closed_output() -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    for end, silent in (("--help | true", True), ("--help >&-", False), ("--none >&-", False)):
        command = ["bash", "-c", f"{sys.executable} launch/plan.py {end}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        assert done.stderr == "" if silent else "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
    done = subprocess.run(
        [sys.executable, "launch/plan.py", "--none"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "unrecognized arguments: --none" in done.stderr


def test_a_reader_that_is_there() -> None:
    """Of a pipe that is full or empty, and of a file."""
    script = "from launch.cli import _reader_has_left, run_main; run_main(lambda _: print(_reader_has_left()) or 0)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n")


@pytest.mark.parametrize(
    ("main", "code"),
    [
        ("lambda _: [print(line, flush=True) for line in range(100_000)] and 0", 141),
        ("lambda _: print('unread') or 75", 75),  # one line, written when the process ends
    ],
)
def test_nobody_reads_the_output_any_more(main: str, code: int) -> None:
    script = f"import time; from launch.cli import run_main; time.sleep(0.5); run_main({main})"
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == code


def test_a_broken_pipe_elsewhere_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(BrokenPipeError(32, "Broken pipe", "pipe:cat")) == 1
    assert "Broken pipe" in capsys.readouterr().err


def test_an_interrupt_is_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_report_refuses_what_is_no_run_and_names_that_clash(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
        (tmp_path / parent / "run" / "metrics.jsonl").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is not a run folder: it holds no metrics\.jsonl"):
        report.main([str(tmp_path / "empty"), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="two runs are named 'run'"):
        report.main([str(tmp_path / "a/run"), str(tmp_path / "b/run"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_quickstart_refuses_too_little_text(tmp_path: Path, tokenizer_folder: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer").symlink_to(tokenizer_folder)
    (tmp_path / "few.txt").write_text("\n\n".join(["the small model reads a large shard fast"] * 3))
    with pytest.raises(ValueError, match=r"the source has too little text: \d+ tokens were held out"):
        quickstart.make_shards(tmp_path / "few.txt", out)
    assert not (out / "shards").exists(), "shards left behind would be taken for finished ones"
