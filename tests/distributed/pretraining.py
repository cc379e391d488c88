"""Start launch/pretrain.py as users do, on small shards, and look at what it left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.distributed.ranks.forked import Forked, run_script
from tests.distributed.ranks.harness import rank_environment
from tests.paths import ROOT
from train.distributed.rendezvous import free_port
from train.loop.metrics import read_rows

DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
STEPS = 24


def small_settings(shards_folder: str, teacher_folder: str) -> list[str]:
    """A distillation of 24 steps of 32 sequences of 32 tokens."""
    return [
        f"--data.shards={shards_folder}",
        f"--model.teacher={teacher_folder}",
        "--model.layer_map=every_other",
        "--data.sequence_length=32",
        "--training.global_batch_size=32",
        "--training.micro_batch_size=8",
        f"--training.max_steps={STEPS}",
        "--checkpoint.every_steps=4",
        "--evaluation.every_steps=8",
        "--run.log_every_steps=4",
        "--optimizer.lr=0.01",
    ]


def start(settings: list[str], run_dir: Path, *more: str) -> subprocess.Popen[str]:
    """Two ranks under the real launcher."""
    launcher = [DEEPSPEED, "--quiet", "--num_gpus", "2", "--master_port", str(free_port())]
    return subprocess.Popen(
        [*launcher, "launch/pretrain.py", f"--run.dir={run_dir}", *settings, *more],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def start_alone(settings: list[str], run_dir: Path, *more: str) -> Forked:
    """One rank, sooner than `start` starts two."""
    return start_command("launch/pretrain.py", f"--run.dir={run_dir}", *settings, *more)


def start_command(script: str, *arguments: str) -> Forked:
    """`python script arguments`, sooner than Python starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return Forked(run_script, str(ROOT / script), *arguments, environment=environment)


def start_without_launcher(
    settings: list[str],
    run_dir: Path,
    *own: list[str],
    folders: Sequence[Path] | None = None,
    before: Callable[[], None] | None = None,
    threads: int = 1,
) -> list[Forked]:
    """One process per entry of `own`, each with its own further flags; nobody ends the others when one dies.

    `folders` are the working directories, by rank; each rank calls `before` first.
    """
    port = free_port()
    return [
        Forked(
            run_script,
            str(ROOT / "launch/pretrain.py"),
            f"--run.dir={run_dir}",
            *settings,
            *flags,
            environment={**rank_environment(rank, len(own), port), "OMP_NUM_THREADS": str(threads)},
            folder=folders[rank] if folders else ROOT,
            before=before,
        )
        for rank, flags in enumerate(own)
    ]


def finish(job: subprocess.Popen[str] | Forked) -> tuple[int, str]:
    """Exit code and all output."""
    output, _ = job.communicate(timeout=240)
    return job.returncode, output


def train(settings: list[str], run_dir: Path, *more: str, ranks: int = 2, threads: int = 1) -> str:
    """Some ranks without a launcher to the end, which must be 0; all output."""
    jobs = start_without_launcher(settings, run_dir, *[list(more)] * ranks, threads=threads)
    ends = [finish(job) for job in jobs]
    output = "".join(output for _, output in ends)
    assert [code for code, _ in ends] == [0] * ranks, output
    return output


def wait_for(
    path: Path, job: subprocess.Popen[str] | Forked, ready: Callable[[], bool] = lambda: True
) -> None:
    """Until `path` exists and `ready()`; AssertionError with the job's output where the job ends first."""
    deadline = time.monotonic() + 120
    while not (path.exists() and ready()):
        assert job.poll() is None, f"the job ended early:\n{job.communicate()[0]}"
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


def ranks_of(job: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes, in rank order."""
    found = {}
    for process in psutil.Process(job.pid).children(recursive=True):
        words = process.cmdline()
        if "launch/pretrain.py" in words and "deepspeed.launcher.launch" not in words:
            found[next(word for word in words if word.startswith("--local_rank"))] = process
    return [found[name] for name in sorted(found)]


def weights(run_dir: Path) -> bytes:
    """The final model's file."""
    return (run_dir / "model" / "model.safetensors").read_bytes()


def losses(run_dir: Path) -> list[float]:
    """Training losses, by logging step."""
    return [row["loss"] for row in read_rows(run_dir) if "loss" in row]


def logged(run_dir: Path, step: int) -> bool:
    """Whether a training loss of that step or a later one is there."""
    return any(row["step"] >= step for row in read_rows(run_dir) if "loss" in row)
