"""How errors reach the user, and what the small commands refuse."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence

import pytest

from data_prep import train_tokenizer, verify_shards, write_shards
from launch.common.cli import parse_config, run_main
from tests.paths import ROOT
from train.errors import LostRankError, RankError, ReportedElsewhereError, UserError


def raising(error: BaseException, one_job: bool = False) -> int:
    def main(arguments: Sequence[str]) -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_main(main, one_job)
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("no such key"), 2),
        (FileNotFoundError(2, "No such file or directory", "shards"), 2),
        (OSError(40, "Too many levels of symbolic links", "shards"), 1),
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


@pytest.mark.parametrize(
    "error", [ValueError("shape mismatch"), RuntimeError("gloo? no"), ConnectionResetError("by peer")]
)
def test_a_defect_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as kept:
        raising(error)
    assert kept.value is error


def test_a_defect_of_a_library_is_a_traceback_and_exit_code_1() -> None:
    script = "from launch.common.cli import run_main; import json; run_main(lambda _: json.loads('{'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert "JSONDecodeError" in done.stderr.splitlines()[-1]


TORCH = {"LOCAL_SIZE": "2", "WORLD_SIZE": "4"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "0"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
OF_RANK = {"RANK": "LOCAL_RANK", "SLURM_PROCID": "SLURM_LOCALID"}
OF_RANK |= {"OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_LOCAL_RANK"}


@pytest.mark.parametrize(
    ("launcher", "rank_name", "printing", "waiting"),
    [
        (TORCH, "RANK", [0, 2], []),
        (SRUN, "SLURM_PROCID", [0, 2], []),
        # These end all ranks of the host, or of all hosts, with the first; one that lives on is alone with its error.
        (TORCH | {"CROSS_RANK": "0"}, "RANK", [0, 1, 2], [1, 3]),
        (TORCH | {"TORCHELASTIC_RUN_ID": "x"}, "RANK", [0, 1, 2], [1, 3]),
        (MPI, "OMPI_COMM_WORLD_RANK", [0, 1, 2, 3], [1, 3]),
    ],
    ids=["environment", "srun", "deepspeed", "torchrun", "mpirun"],
)
def test_before_the_ranks_join_the_first_of_each_host_prints(
    launcher: dict[str, str],
    rank_name: str,
    printing: list[int],
    waiting: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("launch.common.cli.time.sleep", waited.append)
    for rank in range(4):
        own = {rank_name: str(rank), OF_RANK[rank_name]: str(rank % 2)}
        monkeypatch.setattr("os.environ", {**os.environ, **launcher, **own})
        waited.clear()
        assert raising(UserError("training.max_steps=-1"), one_job=True) == 2
        assert capsys.readouterr().err == ("error: training.max_steps=-1\n" if rank in printing else "")
        assert waited == ([10.0] if rank in waiting else [])
        for error in (RankError("2 GPUs on node7"), LostRankError("rank 1 is lost")):
            raising(error, one_job=True)
            assert capsys.readouterr().err == f"error: {error}\n", "its own, and the others' too"
        raising(UserError("no such task"))  # not of one job
        assert capsys.readouterr().err == "error: no such task\n"


@pytest.mark.parametrize(("cause", "code"), [(UserError("no shards"), 2), (LostRankError("rank 1"), 1)])
def test_what_another_rank_reports_is_silent_here(
    cause: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launch.common.cli.time.sleep", lambda seconds: None)
    error = ReportedElsewhereError()
    error.__cause__ = cause
    assert raising(error) == code
    assert capsys.readouterr() == ("", "")


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
    imports = "from launch.common.cli import _reader_has_left, run_main"
    script = f"{imports}; run_main(lambda _: print(_reader_has_left()) or 0)"
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
    script = f"import time; from launch.common.cli import run_main; time.sleep(0.5); run_main({main})"
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


@pytest.mark.parametrize("words", [["--run.dir="], ["--out", ""], ["--config", " "], ["", "--out=x"]])
def test_an_empty_value_is_refused_by_every_command(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of `--run.dir=$RUN` where RUN is not set; as a path it would be the current folder."""
    monkeypatch.setattr(sys, "argv", ["command", *words])
    with pytest.raises(SystemExit) as ended:
        run_main(lambda arguments: 0)
    assert ended.value.code == 2
    assert "is empty; give a value, or leave it out" in capsys.readouterr().err
    for command in (write_shards, train_tokenizer, verify_shards):
        with pytest.raises(SystemExit) as ended:
            command.parse_arguments([*words])
        assert ended.value.code == 2
        assert "is empty; give a value, or leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "word", ["--run.dir=", "--data.shards=", "--model.teacher=", "--model.teacher=['a', '']"]
)
def test_an_empty_value_of_a_recipe_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(word[2:].partition('=')[0])}=.*is empty; give a value"):
        parse_config([word, "--objective.cosine_weight=1"], "")
