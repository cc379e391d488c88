"""The command `halfling`: one table of commands, the launcher, completion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import __main__ as command
from launch.common.cli import parse_config
from tests.paths import ROOT
from tests.unit.launch.test_required_packages import SCRIPTS
from train.engine_config import read_engine_config
from train.errors import UserError


def test_every_entry_point_is_a_command() -> None:
    assert sorted(script for script, _ in command.COMMANDS.values()) == sorted(
        {*SCRIPTS} - {"launch/__main__.py"}
    )
    for name in command.COMMANDS:
        assert f"\n  {name} " in command.help_text()


def test_a_command_goes_by_its_file_s_name_too() -> None:
    assert command.script_of("shards") == command.script_of("write_shards") == "data_prep/write_shards.py"
    assert (
        command.script_of("inspect-batch") == command.script_of("inspect_batch") == "launch/inspect_batch.py"
    )
    with pytest.raises(UserError, match=r"pretain: no such command; did you mean pretrain\?"):
        command.main(["pretain"])


def test_a_command_s_exit_code_and_message_are_its_own() -> None:
    words = [sys.executable, "-m", "halfling", "plan", "--nodez=2"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--nodez" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (
            ["launch", "--num_gpus", "2", "pretrain", "--config", "plan"],
            ["--num_gpus", "2", "FILE", "--config", "plan"],
        ),
        (["launch", "pretrain"], ["FILE"]),
        (["launch/pretrain.py", "--config", "study"], ["launch/pretrain.py", "--config", "study"]),
        (["--hostfile", "hosts", "pretrain"], ["--hostfile", "hosts", "FILE"]),
    ],
)
def test_the_launcher_takes_a_command_s_name_for_its_file(
    words: list[str], asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []

    def started(words: list[str], _: Any) -> tuple[int, bool]:
        called.append(words)
        return 3, False

    monkeypatch.setattr(command, "run_until_stopped", started)
    assert command.main(words) == 3
    place = str(ROOT / "launch" / "pretrain.py")
    before = [*command.LAUNCHER, *command.QUIET]
    assert called == [[*before, *(place if word == "FILE" else word for word in asked)]]


@pytest.mark.parametrize(
    ("typed", "endings"),
    [
        ("halfling pre", {"pretrain "}),
        ("halfling pretrain --optimizer.l", {"--optimizer.lr "}),
        ("halfling quickstart --s", {"--source", "--scale"}),
        ("halfling quickstart ", {"-h", "--help", "--out", "--source", "--scale", "--format"}),
    ],
)
def test_the_shell_completes(typed: str, endings: set[str], tmp_path: Path) -> None:
    """And nothing is started: a quickstart would leave files."""
    asked = {"COMP_LINE": typed, "COMP_POINT": str(len(typed)), "COMP_TYPE": "9", "_ARGCOMPLETE": "1"}
    words = f'exec 8>answer; exec "{sys.executable}" -m halfling'
    environment = {**os.environ, **asked, "_ARGCOMPLETE_IFS": "|", "PYTHONPATH": str(ROOT)}
    subprocess.run(["bash", "-c", words], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert set((tmp_path / "answer").read_text().split("|")) == endings
    assert [path.name for path in tmp_path.iterdir()] == ["answer"]


def test_recipes_and_engines_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_config(["--config", "quickstart-student"], "").training.max_steps == 300
    assert parse_config(["--config=quickstart-teacher"], "").training.max_steps == 900
    assert "zero_optimization" in read_engine_config("ds_configs/bf16.json")
    (tmp_path / "quickstart-student").write_text("training: {max_steps: 7}")  # what lies here comes first
    assert parse_config(["--config", "quickstart-student"], "").training.max_steps == 7
    with pytest.raises(UserError, match="no such file"):
        read_engine_config("other/bf16.json")
