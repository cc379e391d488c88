"""launch/export.py --push: a folder goes to a stand-in of the hub and is read back; refusals come before the work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForMaskedLM

from launch import export
from tests.hub_stand_in import hub
from tests.paths import ROOT
from train.errors import UserError

# In a child: the hub's client reads its variables when it is imported, but the token when it asks.
PUSH = """
import os, sys
from pathlib import Path
from huggingface_hub import hf_hub_download
from train.errors import UserError
from train.export.hub_push import push_folder, require_push
folder, *names = sys.argv[1:]
for name in names:
    os.environ["HF_TOKEN"], name = name.split("@")
    try:
        require_push(name)
        print(push_folder(Path(folder), name, private=True))
        read_back = [hf_hub_download(name, file) for file in ("config.json", "model.safetensors")]
        print(Path(read_back[0]).parent)
    except UserError as error:
        print(error)
"""


def test_a_folder_is_pushed_and_read_back_from_the_hub(teacher_folder: str, tmp_path: Path) -> None:
    with hub("secret") as stand_in:
        stand_in.repositories["me/open"] = {"private": False, "files": {}, "messages": []}
        environment = {**os.environ, "HF_ENDPOINT": stand_in.url, "HF_HOME": str(tmp_path)}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        words = [teacher_folder, "secret@me/small", "secret@me/open", "wrong@me/small"]
        command = [sys.executable, "-c", PUSH, *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    address, read_back, of_open, of_wrong = done.stdout.splitlines()
    assert address == f"{stand_in.url}/me/small"
    assert AutoModelForMaskedLM.from_pretrained(read_back).config.hidden_size == 32
    held = stand_in.repositories["me/small"]
    assert held["private"]
    assert held["messages"] == ["Model exported by Halfling"]
    for path in Path(teacher_folder).iterdir():
        assert held["files"][path.name] == path.read_bytes()
    # A public one is not filled by who asked for a private one.
    assert "exists and is public; nothing was pushed" in of_open
    assert stand_in.repositories["me/open"]["files"] == {}
    assert "was not pushed to me/small: " in of_wrong
    assert f"`hf upload me/small {teacher_folder}`" in of_wrong


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
