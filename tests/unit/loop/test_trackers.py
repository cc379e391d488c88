"""TensorBoard, MLflow, Weights & Biases and Trackio: what they hold after a run and its resume, and what faults cost.

The last three are optional (requirements-trackers.txt); each test of theirs is skipped where its library is missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.config import Config
from train.config_sections.running import RunConfig
from train.distributed.rendezvous import free_port
from train.errors import UserError
from train.loop import trackers
from train.loop.metrics import RunEvents
from train.run_folder import as_tree

CONFIG = as_tree(Config())


def write(run_dir: Path, name: str, *, resumed_step: int = 0, steps: tuple[int, ...] = (2, 4)) -> None:
    """A run's rows, losses equal to the steps."""
    run_dir.mkdir(parents=True, exist_ok=True)
    events = RunEvents(run_dir, "student", resumed_step, 10, (name,), CONFIG)
    for step in steps:
        events.row(step, {"loss": float(step), "heldout_masking": "words"}, {"trust_ratios": torch.ones(3)})
    events.close()


def test_the_configuration_names_all() -> None:
    hint, _ = get_args(get_type_hints(RunConfig)["trackers"])
    assert set(get_args(hint)) == set(trackers.TRACKERS)


def test_tensorboard_has_the_configuration_as_text_and_as_hyper_parameters(tmp_path: Path) -> None:
    write(tmp_path, "tensorboard")
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Scalars("loss/total")[-1].value == 4.0
    (text,) = board.Tensors("config/text_summary")[0].tensor_proto.string_val
    assert b"    optimizer:\n      name: lamb\n" in text
    content = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    for shown in (b"optimizer.name", b"lamb", b"training.global_batch_size"):
        assert shown in content


class Broken:
    """A service that is lost after a start."""

    def __init__(self, start: trackers.Start) -> None:
        self.name = start.name

    def row(self, *_: Any) -> None:
        raise RuntimeError("no\nroute")

    close = row


def test_a_service_that_is_lost_costs_rows_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Broken)
    write(tmp_path, "wandb")
    said = capsys.readouterr().err
    assert said.count("run.trackers: wandb: rows cannot be written (no route)") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_service_that_cannot_begin_and_a_missing_library_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(start: trackers.Start) -> Broken:
        raise RuntimeError("no login")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", refuse)
    with pytest.raises(UserError, match="wandb cannot begin: no login; mend that, or take it off"):
        write(tmp_path, "wandb")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "mlflow" else name)
    with pytest.raises(UserError, match="mlflow not installed here: pip install mlflow"):
        trackers.require_trackers(["tensorboard", "mlflow"])
    trackers.require_trackers(["tensorboard", "wandb"])


def test_a_run_started_anew_is_another_run_of_a_service(tmp_path: Path) -> None:
    start = trackers.Start(tmp_path, "student", 4, {})
    assert trackers.remembered(start, "mlflow") is None
    trackers.remember(start, "wandb", "b")
    trackers.remember(start, "mlflow", "a")
    assert trackers.remembered(start, "mlflow") == "a"
    assert trackers.remembered(replace(start, resumed_step=0), "mlflow") is None


@pytest.fixture
def mlflow_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real server on loopback with its SQLite store."""
    pytest.importorskip("mlflow")
    address = f"http://127.0.0.1:{(port := free_port())}"
    words = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/mlflow.db",
        "--artifacts-destination",
        str(tmp_path),
    ]
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen([sys.executable, "-m", "mlflow", "server", *words], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and server.poll() is None:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
def test_mlflow_s_server_holds_the_run_and_its_resume(mlflow_server: str, tmp_path: Path) -> None:
    # A child: MLflow keeps state in its process.
    code = """
import sys
from pathlib import Path
from tests.unit.loop.test_trackers import write
write(Path(sys.argv[1]), "mlflow")
write(Path(sys.argv[1]), "mlflow", resumed_step=4, steps=(6,))
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True, timeout=300)
    run_id = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]

    def ask(what: str) -> Any:
        with urllib.request.urlopen(f"{mlflow_server}/api/2.0/mlflow/{what}", timeout=20) as answer:
            return json.load(answer)

    history = ask(f"metrics/get-history?run_id={run_id}&metric_key=loss/total")["metrics"]
    assert [(point["step"], point["value"]) for point in history] == [(2, 2.0), (4, 4.0), (6, 6.0)]
    run = ask(f"runs/get?run_id={run_id}")["run"]
    assert run["info"]["status"] == "FINISHED"
    assert run["info"]["run_name"] == "student"
    parameters = {pair["key"]: pair["value"] for pair in run["data"]["params"]}
    assert parameters["objective.temperature"] == "2.0"
    assert [each["path"] for each in ask(f"artifacts/list?run_id={run_id}")["files"]] == ["config.yaml"]


def test_wandb_offline_leaves_its_files_in_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write(tmp_path, "wandb")
    run_id = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    (file,) = (tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    words = (b"loss/total", b"temperature", b"student")
    deadline = time.monotonic() + 60  # a process of wandb's writes it
    while not all(word in file.read_bytes() for word in words) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert [word for word in words if word not in file.read_bytes()] == []
    write(tmp_path, "wandb", resumed_step=4, steps=(6,))
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))) == 2


def test_trackio_holds_the_run_and_its_resume(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    code = """
import sys
from pathlib import Path
from tests.unit.loop.test_trackers import write
write(Path(sys.argv[1]), "trackio")
write(Path(sys.argv[1]), "trackio", resumed_step=4, steps=(6,))
"""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    words = [sys.executable, "-c", code, str(tmp_path / "run")]
    subprocess.run(words, env=environment, check=True, capture_output=True, timeout=120)
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "halfling.db")) as store:
        rows = store.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert [(name, step, json.loads(held)["loss/total"]) for name, step, held in rows] == [
        ("student", 2, 2.0),
        ("student", 4, 4.0),
        ("student", 6, 6.0),
    ]
