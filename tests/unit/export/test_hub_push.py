"""launch/export.py --push: a folder goes to a stand-in of the hub and is read back; refusals come before the work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import export
from tests.hub_stand_in import hub
from tests.paths import ROOT
from train.errors import UserError

# In a child: the hub's client reads its variables when it is imported.
PUSH = """
import sys
from pathlib import Path
from train.errors import UserError
from train.export.hub_push import push_folder, require_push
try:
    require_push(sys.argv[2])
    print(push_folder(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "private"))
    if len(sys.argv) > 4:
        from transformers import AutoModelForMaskedLM
        print(AutoModelForMaskedLM.from_pretrained(sys.argv[2]).config.hidden_size)
except UserError as error:
    print(error)
"""


def push(url: str, home: Path, token: str, *words: str) -> list[str]:
    """What the child prints."""
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HOME": str(home)}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", PUSH, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_folder_is_pushed_and_read_back_from_the_hub(teacher_folder: str, tmp_path: Path) -> None:
    with hub("secret") as stand_in:
        said = push(stand_in.url, tmp_path, "secret", teacher_folder, "me/small", "private", "read")
        assert said == [f"{stand_in.url}/me/small", "32"]
        held = stand_in.repositories["me/small"]
        assert held["private"]
        assert held["messages"] == ["Model exported by Halfling"]
        for path in Path(teacher_folder).iterdir():
            assert held["files"][path.name] == path.read_bytes()
        # A public one is not filled by who asked for a private one.
        stand_in.repositories["me/open"] = {"private": False, "files": {}, "messages": []}
        (said,) = push(stand_in.url, tmp_path, "secret", teacher_folder, "me/open", "private")
        assert "exists and is public; nothing was pushed" in said
        assert stand_in.repositories["me/open"]["files"] == {}
        (said,) = push(stand_in.url, tmp_path, "wrong", teacher_folder, "me/small", "private")
        assert "was not pushed to me/small: " in said
        assert f"`hf upload me/small {teacher_folder}`" in said


def test_nothing_is_exported_where_it_could_not_be_pushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("train.export.hub_push.get_token", lambda: None)
    monkeypatch.setattr(export, "write_folder", pytest.fail)
    for words, what in (
        (["--push", "a/b/c"], "give OWNER/NAME"),
        (["--push", "a/b"], "hf auth login"),
        (["--private"], "give --push NAME too"),
    ):
        with pytest.raises(UserError, match=what):
            export.main([str(tmp_path / "run"), str(tmp_path / "out"), *words])


def test_the_folder_that_was_written_is_pushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed: list[object] = []
    monkeypatch.setattr("train.export.hub_push.require_push", pushed.append)
    monkeypatch.setattr("train.export.hub_push.push_folder", lambda *words: pushed.append(words) or "ADDRESS")
    monkeypatch.setattr(export, "write_folder", lambda options, folder: "written")
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--push", "me/small"]) == 0
    assert pushed == ["me/small", (tmp_path / "out", "me/small", False)]
    assert "pushed: ADDRESS" in capsys.readouterr().out


def test_what_a_card_states_needs_a_run(teacher_folder: str, tmp_path: Path) -> None:
    words = [teacher_folder, str(tmp_path / "out"), "--onnx", "--data-license", "CC0"]
    with pytest.raises(UserError, match="--data-license goes into the card of a run's model"):
        export.main(words)
