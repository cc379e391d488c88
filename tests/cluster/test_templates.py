"""The templates for which no cluster is at hand: PBS and Kubernetes, as far as they can be checked here."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from launch.common.cli import parse_config
from tests.cluster.test_mpi_data_prep import ENV, mpirun
from tests.cluster.test_mpi_data_prep import pytestmark as needs_mpirun
from tests.paths import ROOT

MANIFEST = "launch/kubernetes/pretrain-mpijob.yaml"
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


def test_what_was_not_run_says_so() -> None:
    for script in ("launch/pbs/pretrain.pbs", MANIFEST):
        assert NOT_RUN in (ROOT / script).read_text()


def test_kubernetes_manifest_agrees_with_itself() -> None:
    job = yaml.safe_load((ROOT / MANIFEST).read_text())
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


@needs_mpirun
def test_the_signal_that_saves_reaches_mpirun() -> None:
    """Open MPI 5's mpirun becomes a process of another name, by which pkill finds it."""
    name = (ROOT / MANIFEST).read_text().partition("pkill -USR1 ")[2].split()[0]
    with subprocess.Popen(mpirun(1, ["sleep", "20"]), env=ENV) as process:
        comm, deadline = Path(f"/proc/{process.pid}/comm"), time.monotonic() + 15
        while comm.read_text().strip() != name and time.monotonic() < deadline:
            time.sleep(0.05)
        found = comm.read_text().strip()
        process.terminate()
    assert found == name


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_an_installation_a_job_ends_with_the_remedy(script: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PBS_O_WORKDIR": str(tmp_path), "SLURM_ARRAY_TASK_ID": "0"}
    ended = subprocess.run(
        ["bash", str(ROOT / script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert "submit this from the repository's folder, after `make quickstart`" in ended.stderr


def test_a_pbs_job_submits_itself_with_arguments_that_hold_commas(tmp_path: Path) -> None:
    """PBS parts what `qsub -v` is given at commas, and takes the value of a bare name from the environment."""
    for name, text in {
        ".venv/bin/activate": "",
        "bin/mpirun": "#!/bin/sh\nexit 75\n",
        "bin/qsub": '#!/bin/sh\nprintf "%s\\n" "$@" > submitted\nenv -0 > environment\n',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "nodes").write_text("localhost\n")
    arguments = "--config R.yaml --run.trackers=[tensorboard,mlflow]"
    environment = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "ARGUMENTS": arguments}
    environment |= {"PBS_O_WORKDIR": str(tmp_path), "PBS_NODEFILE": str(tmp_path / "nodes")}
    ended = subprocess.run(
        ["bash", str(ROOT / "launch/pbs/pretrain.pbs")], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 75, ended.stderr
    option, variables, script = (tmp_path / "submitted").read_text().splitlines()
    assert (option, script) == ("-v", "launch/pbs/pretrain.pbs")
    inherited = dict(
        entry.split("=", 1) for entry in (tmp_path / "environment").read_text().split("\0") if entry
    )
    given = [word.partition("=") for word in variables.split(",")]
    job = {name: value if equals else inherited[name] for name, equals, value in given}
    assert job == {"ARGUMENTS": arguments, "SAVE_AFTER_S": "86100"}
