"""The templates for which no cluster is at hand: PBS and Kubernetes, as far as they can be checked here."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml

from launch.cli import parse_config
from tests.cluster.test_mpi_data_prep import ENV
from tests.cluster.test_mpi_data_prep import pytestmark as needs_mpirun
from tests.distributed.pretraining import ROOT, finish, wait_for

NOT_RUN = "NOT RUN ON A REAL CLUSTER"
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix() for path in ROOT.glob("launch/*/*.*b*") if path.suffix != ".py"
)


def test_all_job_scripts_are_seen() -> None:
    names = {Path(script).name for script in SCRIPTS}
    assert {"pretrain.sbatch", "data-prep.sbatch", "pretrain.pbs"} <= names


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_syntax(script: str) -> None:
    checked = subprocess.run(["bash", "-n", script], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def _start_pbs(tmp_path: Path, arguments: str) -> subprocess.Popen[str]:
    """The PBS script on this host, with a `qsub` that writes down what it is given."""
    (tmp_path / "nodes").write_text("localhost\nlocalhost\n")
    (tmp_path / "bin").mkdir()
    qsub = tmp_path / "bin" / "qsub"
    qsub.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/submitted\n')
    qsub.chmod(0o755)
    environment = {**ENV, "PBS_O_WORKDIR": str(ROOT), "PBS_NODEFILE": str(tmp_path / "nodes")}
    environment |= {"ARGUMENTS": arguments, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", str(ROOT / "launch/pbs/pretrain.pbs")],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@needs_mpirun
def test_pbs_hands_an_error_on_and_submits_nothing(tmp_path: Path) -> None:
    assert NOT_RUN in (ROOT / "launch/pbs/pretrain.pbs").read_text()
    code, output = finish(_start_pbs(tmp_path, "--training.max_steps=-1"))
    assert code == 2, output
    assert output.count("error: training.max_steps=-1") == 1, output
    assert not (tmp_path / "submitted").exists()


@needs_mpirun
@pytest.mark.slow
def test_pbs_saves_when_its_timeout_says_so_and_submits_itself_again(
    settings: list[str], tmp_path: Path
) -> None:
    """The test gives `timeout` the signal that it gives itself when the time is over: no clock decides."""
    run_dir = tmp_path / "run"
    arguments = " ".join([*settings, f"--run.dir={run_dir}", "--training.max_steps=100000"])
    job = _start_pbs(tmp_path, arguments)
    wait_for(run_dir / "checkpoints" / "step-00000004" / "complete.json", job)
    (timeout,) = psutil.Process(job.pid).children()
    assert timeout.name() == "timeout"
    timeout.send_signal(signal.SIGUSR1)
    code, output = finish(job)
    assert code == 75, output
    assert "which is saved; run again to continue" in output
    expected = f"-v ARGUMENTS={arguments},SAVE_AFTER_S=86100 launch/pbs/pretrain.pbs\n"
    assert (tmp_path / "submitted").read_text() == expected


def test_kubernetes_manifest_agrees_with_itself() -> None:
    text = (ROOT / "launch/kubernetes/pretrain-mpijob.yaml").read_text()
    assert NOT_RUN in text
    job = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    spec = job["spec"]
    assert set(spec) <= {"slotsPerWorker", "runPolicy", "mpiReplicaSpecs", "launcherCreationPolicy"}
    assert set(spec["mpiReplicaSpecs"]) == {"Launcher", "Worker"}
    pods = {name: replica["template"]["spec"] for name, replica in spec["mpiReplicaSpecs"].items()}
    for pod in pods.values():
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    (launcher,), (worker,) = pods["Launcher"]["containers"], pods["Worker"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == spec["slotsPerWorker"]
    command = launcher["command"]
    ranks = spec["mpiReplicaSpecs"]["Worker"]["replicas"] * spec["slotsPerWorker"]
    assert command[command.index("-n") + 1] == str(ranks)
    assert 64 % ranks == 0, "the number of ranks divides the lanes"
    script = command.index("launch/pretrain.py")
    assert (ROOT / command[script]).is_file()
    assert parse_config(command[script + 1 :], "").data.shards == "/data/shards"
