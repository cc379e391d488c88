"""launch/pretrain.py under mpirun, by the PBS template and by hand: the same job as under deepspeed, its exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.slurm import MPI_AS_ROOT
from tests.cluster.test_mpi_data_prep import ENV, MPIRUN, mpirun
from tests.cluster.test_mpi_data_prep import pytestmark as needs_mpirun
from tests.distributed.pretraining import finish, losses, wait_for
from tests.paths import ROOT

pytestmark = [pytest.mark.slow, needs_mpirun]


def start_pbs(folder: Path, arguments: str) -> subprocess.Popen[str]:
    """The PBS script on this host, with a `qsub` that writes down what it is given."""
    (folder / "nodes").write_text("localhost\nlocalhost\n")
    (folder / "bin").mkdir()
    qsub = folder / "bin" / "qsub"
    qsub.write_text(f'#!/bin/sh\necho "$@" >> {folder}/submitted\n')
    qsub.chmod(0o755)
    environment = {**ENV, "PBS_O_WORKDIR": str(ROOT), "PBS_NODEFILE": str(folder / "nodes")}
    environment |= {"ARGUMENTS": arguments, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", str(ROOT / "launch/pbs/pretrain.pbs")],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture(scope="module")
def saved_under_pbs(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The PBS template, whose `timeout` is given the signal that it gives itself when the time is over.

    Returns the run's folder and the output.
    """
    folder = tmp_path_factory.mktemp("pbs")
    run_dir = folder / "run"
    arguments = " ".join([*settings, f"--run.dir={run_dir}"])
    job = start_pbs(folder, arguments)
    wait_for(run_dir / "checkpoints" / "step-00000004" / "complete.json", job)
    (timeout,) = psutil.Process(job.pid).children()
    assert timeout.name() == "timeout"
    timeout.send_signal(signal.SIGUSR1)
    code, output = finish(job)
    assert code == 75, output
    assert (folder / "submitted").read_text() == "-v ARGUMENTS,SAVE_AFTER_S launch/pbs/pretrain.pbs\n"
    return run_dir, output


def test_a_signal_to_mpirun_saves(saved_under_pbs: tuple[Path, str]) -> None:
    """mpirun hands SIGUSR1 on to the ranks; SIGTERM and Ctrl-C it takes as an order to end them."""
    run_dir, output = saved_under_pbs
    assert "which is saved; run again to continue" in output
    assert list((run_dir / "checkpoints").glob("step-*/complete.json"))


def test_on_two_hosts_the_run_goes_on_and_ends_with_the_losses_of_one(
    saved_under_pbs: tuple[Path, str], hosts: Hosts, settings: list[str], expected_losses: list[float]
) -> None:
    """The command of docs/CLUSTER.md: mpirun starts its daemon on the other host by ssh, where no .venv is active."""
    run_dir, _ = saved_under_pbs
    command = ["-x", "PATH", "python", "launch/pretrain.py", f"--run.dir={run_dir}", *settings]
    environment = {**hosts.environment(), **MPI_AS_ROOT, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        hosts.command("host-a", *mpirun(2, ["--hostfile", str(hosts.hostfile), *command])),
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert f"continuing from {run_dir}/checkpoints/step-" in done.stdout
    assert losses(run_dir) == expected_losses


def test_an_error_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    code, output = finish(start_pbs(tmp_path, "--training.max_steps=-1"))
    assert code == 2, output
    assert output.count("error: training.max_steps=-1") == 1, output
    assert not (tmp_path / "submitted").exists()


def test_another_mpi_than_mpirun_s_is_named(tmp_path: Path) -> None:
    """The usual accident: mpirun of one MPI, mpi4py of another, so that each process is alone."""
    variables = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    call = (
        "import os; from train.distributed.discovery import discover_ranks\n"
        "from train.distributed.rendezvous import rendezvous\n"
        "try: rendezvous(os.environ, discover_ranks(os.environ))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", call], cwd=ROOT, env={**ENV, **variables}, capture_output=True, text=True
    )
    assert "mpirun started 2 processes, but mpi4py sees 1" in done.stdout, done.stderr
    assert MPIRUN is not None
