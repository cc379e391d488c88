"""Faults that end a job with one message or cost it nothing: frozen ranks, full disks, ranks that differ."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import psutil

from data_prep.shard_format.manifest import Manifest
from tests.distributed.pretraining import (
    finish,
    logged,
    ranks_of,
    start,
    start_alone,
    start_without_launcher,
    train,
    wait_for,
)
from train.run_folder import hold


def test_a_frozen_rank_ends_the_job_by_name(settings: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = start(settings, run_dir, "--training.max_steps=100000", "--run.lost_rank_timeout_s=5")
    wait_for(run_dir / "metrics.jsonl", job, lambda: logged(run_dir, 4))
    frozen = ranks_of(job)[1]
    frozen.suspend()
    assert job.stdout is not None
    lines = []
    for line in job.stdout:
        lines.append(line)
        if "error:" in line:
            frozen.kill()  # the launcher would do so after half a minute
            break
    code, rest = finish(job)
    assert code != 0, rest  # the launcher passes on one rank's end: ours, or that of the one killed
    assert re.search(r"rank 1 on \S+ has not been heard of for", lines[-1]), lines


def test_a_frozen_rank_0_is_named_by_another(settings: list[str], tmp_path: Path) -> None:
    words = [*settings, "--training.max_steps=100000", "--run.lost_rank_timeout_s=5"]
    jobs = start_without_launcher(words, tmp_path, [], [])
    wait_for(tmp_path / "metrics.jsonl", jobs[0], lambda: logged(tmp_path, 4))
    jobs[0].send_signal(signal.SIGSTOP)
    code, output = finish(jobs[1])
    jobs[0].kill()
    assert code == 1, output
    assert re.search(r"rank 1 on \S+ has had no answer from rank 0", output), output


def test_ranks_stop_after_saving_when_their_launcher_is_killed(settings: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = start(settings, run_dir, "--training.max_steps=100000", "--checkpoint.every_steps=100000")
    wait_for(run_dir / "metrics.jsonl", job, lambda: logged(run_dir, 4))
    ranks = ranks_of(job)
    job.kill()  # the `deepspeed` command alone; what it started goes on without it
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive
    (saved,) = (run_dir / "checkpoints").glob("step-*")
    assert (saved / "complete.json").exists()


def test_weights_that_are_no_numbers_are_not_saved(settings: list[str], tmp_path: Path) -> None:
    words = ["--optimizer.lr=1e38", "--optimizer.weight_decay=1e30"]
    words += ["--run.log_every_steps=20", "--evaluation.every_steps=20"]
    code, output = finish(start_alone([*settings, *words], tmp_path, "--checkpoint.every_steps=2"))
    assert code == 1, output
    assert output.count("error:") == 1
    assert "infinite or NaN by step 2;" in output
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_shards_rewritten_under_a_run_are_refused(
    settings: list[str], undisturbed: Path, shards_folder: str, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(shards_folder, shards)
    words = [word for word in settings if "data.shards" not in word] + [f"--data.shards={shards}"]
    code, output = finish(start_alone(words, tmp_path / "run", "--training.max_steps=4"))
    assert code == 0, output
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["options"]["seed"] = 7
    (shards / "manifest.json").write_text(json.dumps(manifest))
    code, output = finish(start_alone(words, tmp_path / "run", "--training.max_steps=4"))
    assert code == 2
    assert "other contents of data.shards" in output


def test_two_jobs_in_one_folder_are_one_message(settings: list[str], tmp_path: Path) -> None:
    with hold(tmp_path):
        ends = [finish(job) for job in start_without_launcher(settings, tmp_path, [], [])]
    output = "".join(output for _, output in ends)
    assert {code for code, _ in ends} <= {1, 2}, output
    assert ends[0][0] == 2, output
    assert output.count("is in use by another job") == 1
    assert "Traceback" not in output


def test_a_full_disk_keeps_training_then_ends_with_one_message(settings: list[str], tmp_path: Path) -> None:
    """Files end at 100 kB, as at a full disk: no checkpoint fits."""
    run_dir = tmp_path / "run"
    jobs = start_without_launcher(settings, run_dir, [], [], before=limit_files_to_100_kb)
    ends = [finish(job) for job in jobs]
    output = "".join(output for _, output in ends)
    assert [code for code, _ in ends] == [1, 1], output
    assert output.count("could not be written") == 3, output
    assert output.count("training goes on") == 2
    assert output.count("error:") == 1
    assert not list((run_dir / "checkpoints").glob("*step-*"))
    assert not (run_dir / "checkpoints" / ".partial").exists()
    train(settings, run_dir)
    assert (run_dir / "model").is_dir()


def limit_files_to_100_kb() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_ranks_that_differ_are_refused_at_start(settings: list[str], tmp_path: Path) -> None:
    jobs = start_without_launcher(settings, tmp_path, ["--optimizer.lr=0.01"], ["--optimizer.lr=0.02"])
    ends = [finish(job) for job in jobs]
    assert [code for code, _ in ends] == [2, 2], ends
    output = "".join(output for _, output in ends)
    assert output.count("the ranks differ") == 1
    assert "optimizer.lr: rank 1" in output
    assert not (tmp_path / "metrics.jsonl").exists()


def test_ranks_that_see_other_shards_are_refused_at_start(
    settings: list[str], shards_folder: str, tmp_path: Path
) -> None:
    """The same relative path on two machines: rank 1's shards were written with another option."""
    folders = [tmp_path / "machine-0", tmp_path / "machine-1"]
    for folder in folders:
        shutil.copytree(shards_folder, folder / "shards")
    manifest = Manifest.load(folders[1] / "shards")
    replace(manifest, options={**manifest.options, "seed": "other"}).save(folders[1] / "shards")
    jobs = start_without_launcher([*settings, "--data.shards=shards"], tmp_path, [], [], folders=folders)
    ends = [finish(job) for job in jobs]
    assert [code for code, _ in ends] == [2, 2], ends
    output = "".join(output for _, output in ends)
    assert output.count("the ranks differ") == 1
    assert re.search(r"data.shards in shards: rank 1 on \S+ has [0-9a-f]{57}\.\.\., rank 0 has", output), ends
    assert not (tmp_path / "metrics.jsonl").exists()


def test_retention_keeps_last_milestones_and_best(tmp_path: Path) -> None:
    from train.checkpointing.checkpoint import Retention

    folders = []
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, None), (50, 2.6)):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "complete.json").write_text(
            json.dumps({"step": step, "world_size": 1, "heldout_mlm_loss": loss, "files": {}})
        )
        folders.insert(0, folder)
    gone = Retention(keep_last=1, milestone_every_steps=30).superfluous(folders)
    assert [int(path.name[5:]) for path in gone] == [40, 10]
    assert Retention(keep_last=9).superfluous(folders) == []
