"""launch/pretrain.py under mpirun: the same job as under deepspeed, its exit codes and messages."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.test_mpi_data_prep import ENV, MPIRUN, mpirun
from tests.cluster.test_mpi_data_prep import pytestmark as needs_mpirun
from tests.distributed.pretraining import ROOT, finish, losses, wait_for

pytestmark = [pytest.mark.slow, needs_mpirun]


def launch(settings: list[str], run_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "launch/pretrain.py", f"--run.dir={run_dir}", *settings]
    return subprocess.Popen(
        mpirun(2, command),
        cwd=ROOT,
        env={**ENV, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_signal_saves_and_the_next_call_ends_with_the_losses_of_deepspeed(
    settings: list[str], expected_losses: list[float], tmp_path: Path
) -> None:
    """mpirun hands SIGUSR1 on to the ranks; SIGTERM and Ctrl-C it takes as an order to end them."""
    run_dir = tmp_path / "run"
    job = launch(settings, run_dir)
    wait_for(run_dir / "checkpoints" / "step-00000004" / "complete.json", job)
    job.send_signal(signal.SIGUSR1)
    code, output = finish(job)
    assert code == 75, output
    assert "which is saved; run again to continue" in output
    code, output = finish(launch(settings, run_dir))
    assert code == 0, output
    assert f"continuing from {run_dir}/checkpoints/step-" in output
    assert losses(run_dir) == expected_losses


def test_an_error_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    code, output = finish(launch(["--training.max_steps=-1"], tmp_path))
    assert code == 2, output
    assert output.count("error: training.max_steps=-1") == 1, output


def test_another_mpi_than_mpirun_s_is_named(tmp_path: Path) -> None:
    """The usual accident: mpirun of one MPI, mpi4py of another, so that each process is alone."""
    variables = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    call = (
        "import os; from train.discovery import discover_ranks; from train.rendezvous import rendezvous\n"
        "try: rendezvous(os.environ, discover_ranks(os.environ))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", call], cwd=ROOT, env={**ENV, **variables}, capture_output=True, text=True
    )
    assert "mpirun started 2 processes, but mpi4py sees 1" in done.stdout, done.stderr
    assert MPIRUN is not None
