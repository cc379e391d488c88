"""Runs of launch/pretrain.py that several test files look at; nobody changes their folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.pretraining import finish, small_settings, start


@pytest.fixture(scope="session")
def settings(shards_folder: str, teacher_folder: str) -> list[str]:
    return small_settings(shards_folder, teacher_folder)


@pytest.fixture(scope="session")
def undisturbed(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks from beginning to end."""
    return _finished(settings, tmp_path_factory.mktemp("runs") / "undisturbed", 2)


@pytest.fixture(scope="session")
def on_one_rank(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _finished(settings, tmp_path_factory.mktemp("runs") / "single", 1)


def _finished(settings: list[str], run_dir: Path, ranks: int) -> Path:
    code, output = finish(start(settings, run_dir, ranks))
    assert code == 0, output
    return run_dir
