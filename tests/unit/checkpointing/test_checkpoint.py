"""Checkpoints on disk: which one a start goes on from, and how one is removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.checkpointing.checkpoint import _complete, _remove, newest_checkpoint


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
