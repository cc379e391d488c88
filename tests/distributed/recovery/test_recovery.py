"""What a run goes on from, bit for bit: other numbers of ranks, kills at any moment, damaged checkpoints."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.pretraining import (
    STEPS,
    finish,
    logged,
    losses,
    start_alone,
    start_command,
    start_without_launcher,
    train,
    wait_for,
    weights,
)
from tests.distributed.ranks.late_files import see_late
from train.checkpointing.integrity import COMPLETE, read_facts, record_own_files, write_facts
from train.loop.metrics import read_rows

KILLS = int(os.environ.get("HALFLING_KILLS", "10"))


def test_from_2_to_1_to_2_ranks(settings: list[str], tmp_path: Path) -> None:
    """Two ranks see late what the other one has written in the run folder, as on NFS."""
    # The learning rate depends on the run's length, so a part of it is made by a stop, not by fewer steps; there
    # are many, so that none of the stops comes after the end.
    settings = [*settings, "--training.max_steps=160", "--checkpoint.every_steps=1000"]
    train(settings, tmp_path / "undisturbed", ranks=1)
    run_dir = tmp_path / "run"
    resumed_at = []
    for ranks, until in ((2, 20), (2, 40), (1, 60), (2, 160)):
        late = functools.partial(see_late, str(run_dir)) if ranks > 1 else None
        jobs = start_without_launcher(settings, run_dir, *[[]] * ranks, before=late)
        if until < 160:
            wait_for(run_dir / "metrics.jsonl", jobs[0], lambda until=until: logged(run_dir, until))
            for job in jobs:
                job.send_signal(signal.SIGUSR1)
        ends = [finish(job) for job in jobs]
        output = "".join(output for _, output in ends)
        assert [code for code, _ in ends] == [0 if until == 160 else 75] * ranks, output
        resumed_at += [int(step) for step in re.findall(r"continuing from \S+/step-(\d+)", output)]
    assert "converting it for 2" in output
    assert len(resumed_at) == 3
    assert not (run_dir / "checkpoints" / ".universal").exists()
    expected = {row["step"]: row["loss"] for row in read_rows(tmp_path / "undisturbed") if "loss" in row}
    got = {row["step"]: row["loss"] for row in read_rows(run_dir) if "loss" in row}
    assert set(got) == set(expected)
    for step, loss in expected.items():
        assert got[step] == pytest.approx(loss, rel=1e-6), step


def test_kills_at_random_moments_and_a_truncated_checkpoint(settings: list[str], tmp_path: Path) -> None:
    """A checkpoint after every step: half of the time is spent writing, so that kills fall into it."""
    settings = [
        *settings,
        "--training.max_steps=150",
        "--checkpoint.every_steps=1",
        "--run.log_every_steps=1",
    ]
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "run"
    train(settings, undisturbed)
    seed = time.time_ns()
    rng, kills, during_write, truncated = random.Random(seed), 0, 0, False
    while kills < KILLS:
        jobs = start_without_launcher(settings, run_dir, [], [])
        begun = len(losses(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0
        wait_for(run_dir / "metrics.jsonl", jobs[0], lambda begun=begun: len(losses(run_dir)) != begun)
        time.sleep(rng.random() * 0.5)
        if jobs[0].poll() is not None:
            break  # it finished before the kill
        victim = rng.randrange(2)
        jobs[victim].kill()
        during_write += any((run_dir / "checkpoints" / ".partial").glob("step-*"))
        ends = [finish(job) for job in jobs]
        assert sorted(code for code, _ in ends) == [-signal.SIGKILL, 1], ends
        lost = rf"lost (the connection to )?rank {victim}\b|rank {victim} on \S+ has not been heard of"
        assert sum(bool(re.search(lost, output)) for _, output in ends) == 1, ends
        kills += 1
        complete = sorted((run_dir / "checkpoints").glob("step-*"))
        if not truncated and len(complete) > 1:
            victim = next(complete[-1].glob("zero_pp_rank_1*"))
            os.truncate(victim, victim.stat().st_size // 2)
            truncated = True
    train(settings, run_dir)
    print(f"{kills} kills (seed {seed}), {during_write} of them while a checkpoint was being written")
    assert kills > KILLS // 2
    assert truncated
    assert losses(run_dir) == losses(undisturbed)
    assert weights(run_dir) == weights(undisturbed)


def test_a_damaged_checkpoint_is_passed_over_aloud(
    settings: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir, symlinks=True)
    for name in ("model", "student", "summary.json"):
        path = run_dir / name
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
    victim = run_dir / "checkpoints" / f"step-{STEPS:08d}" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = victim.read_bytes()  # a moment of the optimizer's: a bit that torch and DeepSpeed do not miss
    middle = len(content) // 2
    victim.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    output = train(settings, run_dir)
    assert f"{victim.parent} is passed over: {victim.name} is damaged (its SHA-256" in output
    assert f"continuing from {run_dir}/checkpoints/step-00000020" in output
    assert weights(run_dir) == weights(undisturbed)


def test_a_run_of_which_only_the_checkpoints_are_left_ends(
    settings: list[str], on_one_rank: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(on_one_rank / "checkpoints", run_dir / "checkpoints")
    code, output = finish(start_alone(settings, run_dir))
    assert code == 0, output
    assert "metrics.jsonl are gone" in output
    assert "lost: curves, speed, held-out scores before training" in output
    before, rebuilt = (json.loads((path / "summary.json").read_text()) for path in (on_one_rank, run_dir))
    for name in ("steps", "tokens", "parameters", "heldout"):
        assert rebuilt[name] == before[name], name
    assert rebuilt["loss"] == pytest.approx(before["loss"], rel=1e-6)
    assert (rebuilt["tokens_per_s"], rebuilt["heldout_before"]) == (None, {})
    assert weights(run_dir) == weights(on_one_rank)


class Touches:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.target}",)


def _prepare(checkpoint: Path, target: Path) -> None:
    """Every file of torch's makes `target` where its pickle is run; the digests fit."""
    for file in checkpoint.glob("*.pt"):
        states = torch.load(file, weights_only=False)
        torch.save({**states, "hook": Touches(target)}, file)
    facts = read_facts(checkpoint)
    (checkpoint / COMPLETE).unlink()
    write_facts(checkpoint, facts.step, facts.world_size, record_own_files(checkpoint, 0, 1))


@pytest.mark.parametrize("run", ["on_one_rank", "undisturbed"])
def test_a_prepared_checkpoint_runs_nothing(
    run: str, settings: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Loaded by DeepSpeed, converted for another number of ranks, and exported."""
    run_dir, target = tmp_path / "run", tmp_path / "touched"
    shutil.copytree(request.getfixturevalue(run), run_dir, symlinks=True)
    (run_dir / "summary.json").unlink()
    checkpoint = run_dir / "checkpoints" / f"step-{STEPS:08d}"
    _prepare(checkpoint, target)
    export = start_command("launch/export.py", str(run_dir), str(tmp_path / "out"))
    for code, output in (finish(export), finish(start_alone(settings, run_dir))):
        assert code == 2, output
        assert f"error: {checkpoint} names posix.system: no code of such a file is run here" in output
        assert "Traceback" not in output
        assert "as many ranks" not in output
    assert not target.exists()
    assert not (tmp_path / "out").exists()
