"""The run folder: resolved and changed configurations, its lock, files that are whole or not there."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_prep.shard_format.files import read_json, write_text
from tests.paths import ROOT
from train import run_folder
from train.config import Config
from train.config_sections.running import CheckpointConfig, RunConfig
from train.config_sections.training import OptimizerConfig
from train.distributed.signals import StopRequest
from train.errors import UserError
from train.loop.metrics import RunEvents
from train.run_folder import (
    changed_config,
    changed_inputs,
    final_model,
    found_before,
    hold,
    link_student,
    provenance,
    read_summary,
    refuse_changes,
    write_configs,
)


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
    other = dataclasses.replace(
        Config(),
        optimizer=OptimizerConfig(name="adamw", lr=0.5),
        checkpoint=CheckpointConfig(allow_changed_config=True),
    )
    with pytest.raises(
        UserError, match=r"name: 'lamb' -> 'adamw'\ngive another run.dir, or restore what was$"
    ):
        refuse_changes(other, changed_config(tmp_path, other))
    assert "# torch: " in (tmp_path / "config.yaml").read_text()


def test_a_key_that_older_code_did_not_know_had_its_default(tmp_path: Path) -> None:
    write_configs(tmp_path, Config(), {}, {})
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(
        text.replace("  name: lamb\n", "").replace("  relation_weight: 0.0\n", "")
    )
    assert changed_config(tmp_path, Config()) == []
    other = dataclasses.replace(Config(), optimizer=OptimizerConfig(name="adamw", lr=0.00177 * 2))
    assert "optimizer.name: 'lamb' -> 'adamw'" in changed_config(tmp_path, other)


def test_changed_inputs_are_found(tmp_path: Path) -> None:
    inputs = {"data.shards": "digest", "deepspeed.config": {"a": 1}}
    assert changed_inputs(tmp_path, inputs) == []  # a new folder
    write_configs(tmp_path, Config(), {}, inputs)
    assert changed_inputs(tmp_path, inputs) == []
    more = {**inputs, "data.token_histogram": "not recorded by older code"}
    assert changed_inputs(tmp_path, more) == []
    others = {"data.shards": "another", "deepspeed.config": {"a": 2}}
    assert changed_inputs(tmp_path, others) == [
        "other contents of data.shards",
        "other contents of deepspeed.config",
    ]


def test_other_peoples_files_in_the_run_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"text": "mine"}\n')
    for step in (0, 4):
        RunEvents(tmp_path, "run", step, 10).close()
    assert (tmp_path / "corpus.jsonl").read_text() == '{"text": "mine"}\n'


def test_resolved_config_parses_back(tmp_path: Path) -> None:
    from launch.common.cli import parse_config

    config = dataclasses.replace(Config(), optimizer=OptimizerConfig(clamp=(0.5, 2.0)))
    write_configs(tmp_path, config, {}, {})
    assert parse_config(["--config", str(tmp_path / "config.yaml")], "") == config


def test_a_job_scripts_output_is_no_change_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm writes it on the first node, whose ranks would then differ from the others'."""

    def git(*words: str) -> None:
        settings = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *settings, *words], check=True)

    monkeypatch.setattr(run_folder, "ROOT", tmp_path)
    (tmp_path / "run.py").write_text("1\n")
    for words in (["init", "-q"], ["add", "run.py"], ["commit", "-q", "-m", "first"]):
        git(*words)
    (tmp_path / "slurm-halfling-7.out").touch()
    assert len(provenance()["commit"]) == 40
    (tmp_path / "more").mkdir()
    for changed in ("more/new.py", "run.py"):
        (tmp_path / changed).write_text("2\n")
        assert provenance()["commit"].endswith(" with uncommitted changes")
        (tmp_path / "more" / "new.py").unlink(missing_ok=True)


DAMAGED_JSON = [
    "",
    "{",
    "[1]",
    "null",
    "7",
    '{"a": NaNN}',
    "[" * 100_000,
    '{"a": ' * 100_000,
    "9" * 5000,
    "\0",
]


@pytest.mark.parametrize("text", [*DAMAGED_JSON, b"\xff\xfe{", b'{"a": "\x80"}'], ids=range(12))
def test_damaged_json_is_one_message(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=r"summary.json is damaged \(.*\); make it again") as raised:
        read_json(path, "make it again")
    assert len(str(raised.value)) < 500 + len(str(path))
    with pytest.raises(UserError, match=r"summary.json is damaged \(.*\); restore it, or give"):
        read_summary(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "training: null",
        "training: 3",
        "- a",
        "training: {micro_batch_size: word}",
        "training: {micro_batch_size: 10000000, global_batch_size: 4096}",
        pytest.param("[" * 5000, id="nested 5000 deep"),
        "a: [1",
        "training: {epochs: !!bool x}",
        "training: {epochs: !!timestamp x}",
    ],
)
def test_a_damaged_recipe_is_one_message(text: str, tmp_path: Path) -> None:
    """With sections that are none, and nested too deeply."""
    (tmp_path / "config.yaml").write_text(text)
    training = dataclasses.replace(Config().training, micro_batch_size="auto")
    with pytest.raises(UserError, match=r"config.yaml is damaged \(.*\); restore it, or give another"):
        found_before(tmp_path, dataclasses.replace(Config(), training=training))


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


def test_a_full_disk_does_not_keep_a_job_from_stopping(tmp_path: Path) -> None:
    """The thread that listens for signals marks the lock; what it raised would end it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with StopRequest() as stop, hold(tmp_path / "run") as stopping:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            stop.when_asked(stopping)
            stop.ask()
            with pytest.raises(OSError, match=r"File too large.*new/\.lock"):
                hold(tmp_path / "new").__enter__()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "new").exists()


def test_nothing_is_left_of_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "folder", "text")
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none" / "file", "text")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "\ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Lustre mounted without flock."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(ValueError, match=r"\.lock cannot be locked \(Function not implemented\).*-o flock"):
        hold(tmp_path).__enter__()


def test_the_final_model_is_model_and_student_a_link_to_it(tmp_path: Path) -> None:
    assert final_model(tmp_path) == tmp_path / "model"  # a run that has not ended
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("old")
    assert final_model(tmp_path) == tmp_path / "student"  # of an older version
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("new")
    assert final_model(tmp_path) == tmp_path / "model"  # gone on with, killed before the link
    (tmp_path / ".student.partial").symlink_to("model")  # killed in between
    for _ in range(2):
        link_student(tmp_path)
        assert os.readlink(tmp_path / "student") == "model"
        assert (tmp_path / "student" / "config.json").read_text() == "new"
    assert not (tmp_path / ".student.partial").is_symlink()
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert (moved / "student" / "config.json").read_text() == "new"


def test_a_file_system_without_links_costs_the_link_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    link_student(tmp_path)
    assert (
        f"cannot be a link to model/: Operation not permitted; use {tmp_path}/model"
        in capsys.readouterr().out
    )


def test_a_refused_job_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wrong"), hold(tmp_path / "runs" / "mine"):
        raise UserError("wrong")
    assert not list(tmp_path.iterdir())
    (tmp_path / "theirs").write_text("kept")
    with pytest.raises(UserError, match="wrong"), hold(tmp_path):
        raise UserError("wrong")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    with hold(tmp_path):  # done
        pass
    with pytest.raises(UserError, match="wrong"), hold(tmp_path):
        raise UserError("wrong")
    assert (tmp_path / ".lock").exists(), "it is of the job before"


def test_a_job_that_waited_for_a_refused_one_holds_the_folder(tmp_path: Path) -> None:
    """The file that it waited for is gone: a third must not find the folder free."""
    folder, refused, waits = tmp_path / "run", threading.Event(), threading.Event()

    def first() -> None:
        with contextlib.suppress(UserError), hold(folder):
            waits.set()
            refused.wait(5)
            raise UserError("wrong")

    thread = threading.Thread(target=first)
    thread.start()
    waits.wait(5)
    threading.Timer(0.3, refused.set).start()
    with hold(folder), pytest.raises(UserError, match="in use by another job"):
        hold(folder, wait_if_not_stopping_s=0.1).__enter__()
    thread.join()
