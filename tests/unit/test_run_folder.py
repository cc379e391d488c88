"""Checkpoints on disk, the metrics file, the folder's lock, changed configurations: without any training."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.shard_format.files import write_text
from tests.paths import ROOT
from train.checkpointing.checkpoint import _complete, _remove, newest_checkpoint
from train.checkpointing.state import TrainState
from train.config import CheckpointConfig, Config, OptimizerConfig, RunConfig
from train.distributed.signals import StopRequest
from train.loop.metrics import RunEvents, board_tag, read_rows
from train.loop.profiling import profiling
from train.run_folder import changed_config, changed_inputs, hold, refuse_changes, write_configs


def make_checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "weights.pt").write_bytes(b"x" * 100)
    assert _complete(path, {"step": step, "world_size": 2}) is None
    return path


def test_newest_complete_checkpoint_wins(tmp_path: Path) -> None:
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) is None
    older, newer = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 10)
    assert newest_checkpoint(tmp_path, said.append) == newer
    assert said == []
    (newer / "weights.pt").write_bytes(b"x" * 99)
    assert newest_checkpoint(tmp_path, said.append) == older
    assert len(said) == 1
    assert "weights.pt has 99 bytes instead of 100" in said[0]


def test_missing_file_or_list_is_passed_over(tmp_path: Path) -> None:
    said: list[str] = []
    (make_checkpoint(tmp_path, 1) / "weights.pt").unlink()
    (make_checkpoint(tmp_path, 2) / "complete.json").unlink()
    (make_checkpoint(tmp_path, 3) / "complete.json").write_text('{"files": ')
    assert newest_checkpoint(tmp_path, said.append) is None
    assert ["unreadable" in said[0], "unreadable" in said[1], "is missing" in said[2]] == [True] * 3


def test_a_folder_still_being_written_is_not_seen(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / ".partial", 7)
    assert newest_checkpoint(tmp_path, lambda _: None) is None


def test_rows_past_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    events = RunEvents(tmp_path, "run", 0, 10)
    for step in (2, 4, 6):
        events.row(step, {"loss": float(step)}, {"trust_ratios": torch.ones(3)})
    events.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a kill in the middle of a write
    events = RunEvents(tmp_path, "run", 4, 10)
    events.row(6, {"loss": 60.0})
    events.close()
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path)] == [(2, 2.0), (4, 4.0), (6, 60.0)]


def test_a_start_at_step_0_writes_its_row_anew(tmp_path: Path) -> None:
    for loss in (5.0, 6.0):  # killed before the first checkpoint, then started again
        events = RunEvents(tmp_path, "run", 0, 10)
        events.row(0, {"heldout_mlm_loss": loss})
        events.close()
    assert [row["heldout_mlm_loss"] for row in read_rows(tmp_path)] == [6.0]


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = RunEvents(tmp_path, "student", 0, 10)
    events.row(10, {"loss": 3.25, "tokens_per_s": 12345.0})
    events.close()
    line = capsys.readouterr().err
    assert "student: step 10/10" in line
    assert "loss 3.25" in line
    assert "left" in line


@pytest.mark.parametrize(
    ("key", "tag"),
    [
        ("loss", "loss/total"),
        ("loss_kd", "loss/kd"),
        ("loss_scale", "optimizer/loss_scale"),
        ("top1_agreement", "loss/top1_agreement"),
        ("share_mlm", "share/mlm"),
        ("heldout_kl", "heldout/kl"),
        ("teacher_heldout_mlm_loss", "heldout/teacher_mlm_loss"),
        ("trust_ratio_min", "optimizer/trust_ratio_min"),
        ("time_data", "time/data"),
        ("startup_imports", "startup/imports"),
        ("mfu", "speed/mfu"),
        ("epoch", "progress/epoch"),
    ],
)
def test_board_groups(key: str, tag: str) -> None:
    assert board_tag(key) == tag


def test_changed_config_is_shown_and_refused(tmp_path: Path) -> None:
    assert changed_config(tmp_path, Config()) == []  # a new folder
    write_configs(tmp_path, Config(), {"train_batch_size": 1}, {})
    assert changed_config(tmp_path, Config()) == []
    assert changed_config(tmp_path, dataclasses.replace(Config(), run=RunConfig(log_every_steps=3))) == []
    changed = dataclasses.replace(Config(), optimizer=OptimizerConfig(lr=0.5))
    changes = changed_config(tmp_path, changed)
    assert changes == ["optimizer.lr: 0.00177 -> 0.5"]
    refuse_changes(Config(), [])
    refuse_changes(Config(checkpoint=CheckpointConfig(allow_changed_config=True)), changes)
    with pytest.raises(ValueError, match=r"optimizer.lr: 0.00177 -> 0.5\n.*allow_changed_config"):
        refuse_changes(Config(), changes)
    assert json.loads((tmp_path / "ds_config.json").read_text()) == {"train_batch_size": 1}
    assert "# torch: " in (tmp_path / "config.yaml").read_text()


def test_a_removed_checkpoint_is_never_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, partial = make_checkpoint(tmp_path, 5), tmp_path / ".partial"
    partial.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", lambda *args, **options: None)  # killed before it
        _remove(old, partial)
    assert not old.exists()
    assert [path.name for path in partial.iterdir()] == [old.name]  # goes with the next write
    held = make_checkpoint(tmp_path, 6)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", _busy)
        _remove(held, partial)
    assert newest_checkpoint(tmp_path, pytest.fail) == held


def _busy(*paths: Path) -> None:
    raise OSError("Device or resource busy")


def test_a_profile_of_too_few_steps_or_to_a_full_disk_gives_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = RunEvents(tmp_path, "run", 0, 10)
    for folder, steps in ((tmp_path / "few", 3), (tmp_path / "metrics.jsonl" / "no-folder", 4)):
        with profiling(folder, 0, 3, events) as observers:
            for _ in range(steps):
                observers[0].after_step(TrainState())
    events.close()
    few, full = capsys.readouterr().err.splitlines()
    assert few == "profile: nothing was traced: this start made 3 steps, and the first 3 are left out"
    assert "profile: the trace could not be written" in full


def test_changed_inputs_are_found(tmp_path: Path) -> None:
    inputs = {"data.shards": "digest", "deepspeed.config": {"a": 1}}
    assert changed_inputs(tmp_path, inputs) == []  # a new folder
    write_configs(tmp_path, Config(), {}, inputs)
    assert changed_inputs(tmp_path, inputs) == []
    others = {"data.shards": "another", "deepspeed.config": {"a": 2}}
    assert changed_inputs(tmp_path, others) == [
        "other contents of data.shards",
        "other contents of deepspeed.config",
    ]


def test_rows_that_are_no_numbers_stay_json(tmp_path: Path) -> None:
    events = RunEvents(tmp_path, "run", 0, 10)
    events.row(1, {"loss": float("nan"), "lr": float("inf")})
    events.close()
    assert read_rows(tmp_path) == [{"step": 1, "loss": None, "lr": None}]


def test_records_and_histograms_of_no_numbers_are_written(tmp_path: Path) -> None:
    events = RunEvents(tmp_path, "run", 0, 10)
    events.row(1, {"loss": 1.0}, {"trust_ratios": torch.tensor([float("nan")])})
    events.record("spikes", 1, {"loss": float("inf"), "window_ids": [3, 4]})
    events.close()
    assert (tmp_path / "spikes.jsonl").read_text() == '{"step": 1, "loss": null, "window_ids": [3, 4]}\n'


def test_other_peoples_files_in_the_run_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"text": "mine"}\n')
    for step in (0, 4):
        RunEvents(tmp_path, "run", step, 10).close()
    assert (tmp_path / "corpus.jsonl").read_text() == '{"text": "mine"}\n'


def test_a_full_disk_costs_rows_and_not_the_run(tmp_path: Path) -> None:
    """Files end at 2,000 bytes for a while, as at a full disk."""
    code = """
import resource, sys, time
from pathlib import Path
from train.loop.metrics import RunEvents
events = RunEvents(Path(sys.argv[1]), "run", 0, 1000)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
for step in range(1, 400):
    events.row(step, {"loss": 1.0})
    time.sleep(0.001)  # TensorBoard's thread writes
events.record("spikes", 400, {"window_ids": list(range(1000))})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
events.row(400, {"loss": 2.0})
events.close()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("rows cannot be written") == 1
    rows = read_rows(tmp_path)
    assert rows[-1] == {"step": 400, "loss": 2.0}
    assert 20 < len(rows) <= 400
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Scalars("loss/total")[-1].step == 400


def test_resolved_config_parses_back(tmp_path: Path) -> None:
    from launch.cli import parse_config

    config = dataclasses.replace(Config(), optimizer=OptimizerConfig(clamp=(0.5, 2.0)))
    write_configs(tmp_path, config, {}, {})
    assert parse_config(["--config", str(tmp_path / "config.yaml")], "") == config


def test_a_folder_is_held_by_one_job(tmp_path: Path) -> None:
    code = "from pathlib import Path; from train.run_folder import hold\n"
    code += f"with hold(Path({str(tmp_path)!r}), wait_if_not_stopping_s=0.5): pass"
    command = [sys.executable, "-c", code]
    with hold(tmp_path):
        refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "is in use by another job (process" in refused.stderr
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_a_job_that_stops_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop, hold(tmp_path) as stopping:
        stop.when_asked(stopping)
        with pytest.raises(ValueError, match=r"is in use by another job \(process \d+ on \S+\): "):
            hold(tmp_path, wait_if_not_stopping_s=0.1).__enter__()
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 5
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        begun = time.monotonic()
        with pytest.raises(ValueError, match=r"\(process \d+ on \S+, stopping\)"):
            hold(tmp_path, wait_s=1.0, wait_if_not_stopping_s=0.1).__enter__()
        assert time.monotonic() - begun > 1.0
    assert capsys.readouterr().out.count("waiting for another job (process ") == 1
    stopping()  # too late to matter
    with hold(tmp_path, wait_s=0.1, wait_if_not_stopping_s=0.1):
        pass


def test_nothing_is_left_of_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "folder", "text")
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none" / "file", "text")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "\ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_lost_terminal_costs_lines_only(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", buffering=1) as unread:
        unread.isatty = lambda: terminal  # type: ignore[method-assign]
        monkeypatch.setattr("sys.stderr", unread)
        events = RunEvents(tmp_path, "run", 0, 3)
        os.close(reader)
        for step in range(1, 4):
            events.row(step, {"loss": 1.0})
        events.say("saved")
        events.close()
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # what is left in the buffer
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Lustre mounted without flock."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(ValueError, match=r"\.lock cannot be locked \(Function not implemented\).*-o flock"):
        hold(tmp_path).__enter__()
