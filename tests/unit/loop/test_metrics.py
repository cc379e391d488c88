"""metrics.jsonl, TensorBoard, the progress lines and the profile: what they hold, and what faults cost."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.paths import ROOT
from train.checkpointing.state import LossWindow, TrainState
from train.config import Config
from train.loop.loss_accumulator import LossSums
from train.loop.metrics import NoEvents, RunEvents, board_tag, read_rows
from train.loop.observers.logged_figures import ComputeCost, Logging
from train.loop.profiling import profiling
from train.loop.timing import Clock


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


@pytest.mark.parametrize("stops", [[5], [5, 5], [5, 7]], ids=str)
def test_a_row_is_the_same_after_a_resume_with_smaller_micro_batches(
    stops: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 ranks, then 4 whose micro batches are half as large, stopped again or not; equal losses on all of them."""

    def steps(ranks: int, first: int, stop: int, window: LossWindow) -> LossSums:
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: ranks)
        losses = LossSums(micro_batches_per_step=ranks)
        losses.restore(window, "cpu")
        for step in range(first, stop):
            losses.add(step, {"loss": torch.tensor(6.0 if step < 5 else 5.0)})
        return losses

    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr(
        "torch.distributed.all_gather", lambda found, own: [each.copy_(own) for each in found]
    )
    state, ranks = TrainState(), 2
    for stop in stops:
        state = TrainState(stop, steps(ranks, state.step, stop, state.losses).window())
        state, ranks = TrainState.from_dict(json.loads(json.dumps(asdict(state)))), 4
    assert steps(4, state.step, 10, state.losses).take()[2][0] == 5.5


def test_sums_of_an_older_checkpoint_are_shared_out_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one rank, on two now; it does not say how many micro batches a step had."""
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr(
        "torch.distributed.all_gather", lambda found, own: [each.copy_(own) for each in found]
    )
    saved = {"step": 3, "losses": {"sums": {"loss": [18.0]}, "micro_batches": 3}}
    losses = LossSums(micro_batches_per_step=2)
    losses.restore(TrainState.from_dict(saved).losses, "cpu")
    losses.add(3, {"loss": torch.tensor(1.0)})
    assert losses.window() == LossWindow({"loss": [10.0, 10.0]}, 2.5, 2)
    assert losses.take()[2].tolist() == [4.0, 1.0]


def test_a_line_that_is_no_row_is_left_out(tmp_path: Path) -> None:
    assert read_rows(tmp_path) == []  # no file
    damaged = ["7", "null", "[]", "{}", '{"step": "2"}', '{"step": 2, "loss": "3"}', "[" * 100_000, "\0" * 20]
    lines = ['{"step": 1, "loss": 5.0}', *damaged, '{"step": 4, "loss": null}']
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"step": 5, "\xff": 1}\n')
    assert read_rows(tmp_path) == [{"step": 1, "loss": 5.0}, {"step": 4, "loss": None}]
    RunEvents(tmp_path, "run", 4, 10).close()
    assert read_rows(tmp_path) == [{"step": 1, "loss": 5.0}, {"step": 4, "loss": None}]


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
    assert "tokens_per_s 12,345" in line
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


def test_rows_records_and_histograms_of_no_numbers_are_written(tmp_path: Path) -> None:
    events = RunEvents(tmp_path, "run", 0, 10)
    values = {"loss": float("nan"), "lr": float("inf")}
    events.row(1, values, {"trust_ratios": torch.tensor([float("nan")])})
    events.record("spikes", 1, {"loss": float("inf"), "window_ids": [3, 4]})
    events.close()
    assert read_rows(tmp_path) == [{"step": 1, "loss": None, "lr": None}]
    assert (tmp_path / "spikes.jsonl").read_text() == '{"step": 1, "loss": null, "window_ids": [3, 4]}\n'


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


@pytest.mark.parametrize("columns", [0, 80])
def test_the_bar_keeps_its_figures_on_a_terminal_of_any_width(
    columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of other figures (start-up times, held-out scores) do not empty it; 0 columns is what some terminals say."""
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(terminal, "w", buffering=1) as screen:
        monkeypatch.setattr("sys.stderr", screen)
        events = RunEvents(tmp_path, "run", 0, 3)
        events.row(2, {"loss": 3.25, "tokens_per_s": 12345.0})
        events.row(3, {"heldout_mlm_loss": 4.5})
        events.row(3, {"startup_imports": 2.0})
        events.close()
        monkeypatch.undo()
    shown = ""
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while True:
            shown += os.read(reader, 100_000).decode(errors="replace")
    os.close(reader)
    last = re.split(r"[\r\n]+", shown.rstrip())[-1]
    assert "3/3" in last
    assert "loss 3.25, held-out 4.5, 12,345 tokens/s" in last
    assert len(last) <= 80


def test_utilisation_is_never_above_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak measured while something else ran: training at twice that rate is the peak from then on."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    now = iter([0.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    tokens = {0: 0, 10: 100, 20: 500, 30: 600}
    data = SimpleNamespace(
        tokens_before=lambda step, left_out=(): tokens[step],
        phase_of=lambda step: SimpleNamespace(sequence_length=8),
    )
    engine = SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(data=data, engine=engine, clock=SimpleNamespace(read=dict))
    cost = ComputeCost({8: 3.0}, matrix_rate=300.0)
    logging = Logging(trainer, NoEvents(), Config(), cost, TrainState())  # type: ignore[arg-type]
    used = [logging._speed(TrainState(step))["mfu"] for step in (10, 20, 30)]
    assert used == [0.5, 1.0, 0.25]


def test_what_a_start_that_diverged_has_spent_is_no_part_of_the_next_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a rollback a new start goes on with the same clock."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    now = iter([0.0, 100.0, 100.0, 110.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    data = SimpleNamespace(
        tokens_before=lambda step, left_out=(): 10 * step,
        phase_of=lambda step: SimpleNamespace(sequence_length=8),
    )
    clock, engine = Clock("cpu"), SimpleNamespace(device=torch.device("cpu"))
    with clock.host_section("evaluation"):  # whose loss was no number
        pass
    trainer = SimpleNamespace(data=data, engine=engine, clock=clock)
    cost = ComputeCost({8: 3.0}, matrix_rate=300.0)
    logging = Logging(trainer, NoEvents(), Config(), cost, TrainState())  # type: ignore[arg-type]
    assert logging._speed(TrainState(10))["tokens_per_s"] == 10.0
