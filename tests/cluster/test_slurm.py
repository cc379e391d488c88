"""The Slurm templates on a real slurmctld, slurmd and munged: signal, requeue, time limit, data preparation."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from data_prep.verify_shards import main as verify
from tests.cluster.hosts import Hosts
from tests.cluster.needs import need
from tests.cluster.slurm import Slurm
from tests.conftest import WORDS
from tests.distributed.data_prep_runs import write_corpus
from tests.distributed.pretraining import losses
from train.distributed.discovery import first_host

pytestmark = pytest.mark.slow
PRETRAIN = "launch/slurm/pretrain.sbatch"


@pytest.fixture(scope="module")
def slurm(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    need("slurmctld", "slurmd", "srun", "munged")
    with Slurm(hosts, tmp_path_factory.mktemp("slurm") / "files") as opened:
        yield opened


class Ended(NamedTuple):
    """What two starts of a job left."""

    before: dict[str, str]
    after: dict[str, str]
    output: str
    run_dir: Path
    steps_at_end: list[int]


def freeze(ready: Callable[[], bool], script: str, *words: str) -> list[psutil.Process]:
    """Stop the processes of `script` with `words` as soon as `ready()`: the machine's speed decides nothing."""
    deadline = time.monotonic() + 150
    while not ready():
        assert time.monotonic() < deadline, f"{script} {words} did not get there"
        time.sleep(0.02)
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if {script, *words} <= set(command) and "srun" not in command[0]:
            process.suspend()
            found.append(process)
    return found


def freeze_at_step(run_dir: Path, step: int) -> list[psutil.Process]:
    done = run_dir / "checkpoints" / f"step-{step:08d}" / "complete.json"
    return freeze(done.exists, "launch/pretrain.py", f"--run.dir={run_dir}")


def submit(slurm: Slurm, run_dir: Path, nodes: int, settings: list[str], *options: str) -> str:
    """The template as users submit it, on nodes with a GPU each."""
    node = [f"--nodes={nodes}", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
    script = [PRETRAIN, f"--run.dir={run_dir}", "--run.lost_rank_timeout_s=600", *settings]
    return slurm.submit(run_dir.with_suffix(".out"), *node, *options, *script)


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(
        int(path.parent.name[5:]) for path in (run_dir / "checkpoints").glob("step-*/complete.json")
    )


def signalled(slurm: Slurm, run_dir: Path, settings: list[str]) -> Ended:
    """Slurm's own signal before the time limit; the script requeues the job, which finishes."""
    job = submit(slurm, run_dir, 2, settings, "--time=10", "--signal=USR1@100")
    freeze_at_step(run_dir, 4)
    slurm.run(
        "scontrol", "update", f"JobId={job}", "EndTime=now+60"
    )  # Slurm looks every 30 s, and wakes the ranks
    before = slurm.wait_for_state(job, "PENDING")
    saved = checkpoints(run_dir)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    after = slurm.wait_for_state(job, "COMPLETED", "FAILED", "TIMEOUT")
    return Ended(before, after, run_dir.with_suffix(".out").read_text(), run_dir, saved)


def out_of_time(slurm: Slurm, run_dir: Path, settings: list[str]) -> Ended:
    """The time limit without a signal before it, and no time to save after SIGTERM: submitted again, it goes on."""
    job = submit(slurm, run_dir, 1, settings, "--time=10", "--signal=USR1@0")
    (rank,) = freeze_at_step(run_dir, 8)
    slurm.run("scontrol", "update", f"JobId={job}", "EndTime=now+1")
    while rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE:
        rank.suspend()  # Slurm wakes it for its SIGTERM
        time.sleep(0.005)
    before, saved = slurm.wait_for_state(job, "TIMEOUT", "COMPLETED", "FAILED"), checkpoints(run_dir)
    job = submit(slurm, run_dir, 1, settings, "--time=10")
    after = slurm.wait_for_state(job, "COMPLETED", "FAILED", "TIMEOUT")
    return Ended(before, after, run_dir.with_suffix(".out").read_text(), run_dir, saved)


def fine_tuned(slurm: Slurm, folder: Path, model: str) -> list[Ended]:
    """An array of two tasks: index 0 is told to save, and is requeued without index 1."""
    for task, column in (("SST-2", "sentence"), ("IMDb", "text")):
        (folder / task).mkdir(parents=True)
        rows = [f"{word}\t{number % 2}" for number, word in enumerate(WORDS)]
        for name in ("train", "test" if task == "IMDb" else "dev"):
            (folder / task / f"{name}.tsv").write_text("\n".join([f"{column}\tlabel", *20 * rows, ""]))
    out = folder / "scores"
    arguments = ["--model", model, "--data", str(folder), "--out", str(out), "--max-length", "16"]
    arguments += ["--epochs", "4", "--checkpoint-seconds", "0"]
    script = ["--array=0-1", "--cpus-per-task=1", "launch/slurm/finetune-array.sbatch", *arguments]
    job = slurm.submit(folder / "%a.out", "--export=ALL,HALFLING_TASKS=sst2 imdb", *script)
    processes = freeze(
        lambda: any(out.glob("sst2/**/checkpoint-*/complete.json")), "launch/finetune.py", str(out), "sst2"
    )
    slurm.run("scancel", "--signal=USR1", f"{job}_0")
    time.sleep(0.5)  # the signal comes by way of slurmd and slurmstepd
    for process in processes:
        process.resume()
    ends = []
    for index in range(2):
        after = slurm.wait_for_state(f"{job}_{index}", "COMPLETED", "FAILED", "TIMEOUT")
        ends.append(Ended(after, after, (folder / f"{index}.out").read_text(), out, []))
    return ends


@pytest.fixture(scope="module")
def ended(
    slurm: Slurm, settings: list[str], teacher_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> list[Ended]:
    """All scenarios at once: they mostly wait for Slurm's clock."""
    folder = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(signalled, slurm, folder / "signalled", settings)
        second = pool.submit(out_of_time, slurm, folder / "out-of-time", settings)
        third = pool.submit(fine_tuned, slurm, folder / "fine-tuned", teacher_folder)
        return [first.result(), second.result(), *third.result()]


def test_signal_before_the_time_limit_saves_requeues_and_goes_on(
    ended: list[Ended], expected_losses: list[float]
) -> None:
    before, after, output, run_dir, saved = ended[0]
    print(output)
    assert before["Restarts"] == "1", output
    assert after["JobState"] == "COMPLETED", output
    assert after["ExitCode"] == "0:0"
    step = saved[-1]
    assert 4 <= step < 24
    assert f"stopped after step {step}, which is saved; run again to continue" in output
    assert output.index("saved; requeueing") < output.index("start 2, on ")
    assert f"continuing from {run_dir}/checkpoints/step-{step:08d}" in output
    assert losses(run_dir) == expected_losses


def test_time_limit_loses_at_most_the_steps_since_the_last_save(
    ended: list[Ended], expected_losses: list[float]
) -> None:
    before, after, output, run_dir, saved = ended[1]
    assert before["JobState"] == "TIMEOUT", output
    assert before["Restarts"] == "0"
    assert after["JobState"] == "COMPLETED", output
    assert saved[-1] % 4 == 0, "a kill saves nothing"
    assert f"continuing from {run_dir}/checkpoints/step-{saved[-1]:08d}" in output
    assert losses(run_dir) == pytest.approx(expected_losses, rel=1e-6)


def test_an_array_fine_tunes_and_requeues_the_index_that_was_stopped(ended: list[Ended]) -> None:
    stopped, other = ended[2:]
    assert (stopped.after["JobState"], other.after["JobState"]) == ("COMPLETED", "COMPLETED"), stopped.output
    assert (stopped.after["Restarts"], other.after["Restarts"]) == ("1", "0")
    assert stopped.output.index("saved; requeueing") < stopped.output.index("(sst2), start 2, on ")
    for task in ("sst2", "imdb"):
        scores = json.loads((stopped.run_dir / task / "scores.json").read_text())
        assert set(scores["seeds"]) == {"0"}
        assert scores["dev_examples"] == {"dev": 320}


def test_an_error_is_one_message_and_exit_code_2(slurm: Slurm, tmp_path: Path) -> None:
    command = ["srun", "--ntasks=3", sys.executable, "launch/pretrain.py", f"--data.shards={tmp_path}"]
    done = slurm.type(*command, "--training.max_steps=-1")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: training.max_steps=-1") == 1, done.stderr


def test_contradicting_variables_are_one_message(slurm: Slurm) -> None:
    """RANK, left by an earlier job in the shell, goes with srun to every task."""
    call = "import os; from train.distributed.discovery import discover_ranks; discover_ranks(os.environ)"
    done = slurm.type("srun", "--ntasks=2", sys.executable, "-c", call, RANK="0")
    assert "RANK=0 but SLURM_PROCID=1: two launchers contradict each other" in done.stderr


def test_data_preparation_as_a_batch_job(slurm: Slurm, tokenizer_folder: str, tmp_path: Path) -> None:
    corpus, out = write_corpus(tmp_path / "corpus", WORDS), tmp_path / "shards"
    arguments = [str(corpus), "--tokenizer", tokenizer_folder, "--out", str(out)]
    job = slurm.submit(
        tmp_path / "out", "--nodes=2", "--ntasks-per-node=1", "launch/slurm/data-prep.sbatch", *arguments
    )
    after = slurm.wait_for_state(job, "COMPLETED", "FAILED", "TIMEOUT")
    assert after["JobState"] == "COMPLETED", (tmp_path / "out").read_text()
    assert verify([str(out)]) == 0


def test_first_host_as_slurm_itself_reads_it(slurm: Slurm) -> None:
    rng = random.Random(0)
    for _ in range(10):
        names = [f"{rng.choice('ab')}{number:0{rng.choice([1, 3])}d}" for number in rng.sample(range(120), 5)]
        short = slurm.run("scontrol", "show", "hostlist", ",".join(names))
        assert first_host(short) == slurm.run("scontrol", "show", "hostnames", short).split()[0], short
