"""launch/slurm/finetune-array.sbatch under bash, with an srun and an scontrol that write down how they are called."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from launch.finetune import parser, tasks_of
from tests.paths import ROOT
from train.finetuning.tasks import TASKS

SCRIPT = ROOT / "launch" / "slurm" / "finetune-array.sbatch"
GIVEN = ["--model", "a model", "--out", "scores", "--seeds", "5"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository of which there are only the commands that the script calls."""
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "activate").write_text(f'PATH="{binaries}:$PATH"\n')
    for name, code in (("srun", "${FAKE_CODE:-0}"), ("scontrol", "0")):
        command = binaries / name
        command.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > "{tmp_path}/{name}.txt"\nexit {code}\n')
        command.chmod(0o755)
    return tmp_path


def submit(folder: Path, index: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    slurm = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_JOB_ID": "40", "SLURM_JOB_ID": "40"}
    slurm |= {"SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_NODELIST": "node1"}
    kept = {name: value for name, value in os.environ.items() if name != "HALFLING_TASKS"}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        cwd=folder,
        env={**kept, **slurm, **environment},
        capture_output=True,
        text=True,
    )


def called(folder: Path, name: str) -> list[str] | None:
    path = folder / f"{name}.txt"
    return path.read_text().splitlines() if path.exists() else None


@pytest.mark.parametrize("index", range(len(TASKS)))
def test_every_index_is_a_task(folder: Path, index: int) -> None:
    done = submit(folder, index, *GIVEN)
    task = list(TASKS)[index]
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"job 40_{index} ({task}), start 1, on node1\n"
    arguments = called(folder, "srun")
    assert arguments is not None
    assert arguments[:4] == ["--cpus-per-task=8", "python", "-u", "launch/finetune.py"]
    # What is passed on is what launch/finetune.py takes.
    options = parser().parse_args(arguments[4:])
    assert (options.model, options.seeds, [own.name for own in tasks_of(options.task)]) == (
        "a model",
        5,
        [task],
    )
    assert called(folder, "scontrol") is None


def test_the_array_has_as_many_indices_as_there_are_tasks() -> None:
    (last,) = re.findall(r"^#SBATCH --array=0-(\d+)$", SCRIPT.read_text(), re.MULTILINE)
    assert int(last) == len(TASKS) - 1


def test_other_tasks(folder: Path) -> None:
    assert submit(folder, 1, *GIVEN, HALFLING_TASKS="sst2 squad").returncode == 0
    arguments = called(folder, "srun")
    assert arguments is not None
    assert arguments[-2:] == ["--task", "squad"]
    refused = submit(folder, 2, *GIVEN, HALFLING_TASKS="sst2 squad")
    assert refused.returncode == 2
    assert refused.stderr == "index 2: there are 2 tasks (sst2 squad); submit with --array=0-1\n"


def test_a_saved_index_is_requeued_alone(folder: Path) -> None:
    done = submit(folder, 3, *GIVEN, FAKE_CODE="75", SLURM_RESTART_COUNT="1")
    assert done.returncode == 75
    assert called(folder, "scontrol") == ["requeue", "40_3"]
    assert done.stdout.splitlines() == ["job 40_3 (stsb), start 2, on node1", "saved; requeueing"]


def test_a_failed_index_is_not_requeued(folder: Path) -> None:
    assert submit(folder, 3, *GIVEN, FAKE_CODE="2").returncode == 2
    assert called(folder, "scontrol") is None


@pytest.mark.parametrize("argument", [["--task", "sst2"], ["--task=sst2"]])
def test_tasks_are_not_given_twice(folder: Path, argument: list[str]) -> None:
    done = submit(folder, 0, *GIVEN, *argument)
    assert (done.returncode, called(folder, "srun")) == (2, None)
    assert "name the tasks in HALFLING_TASKS instead" in done.stderr
