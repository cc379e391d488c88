"""Tiny shards that several test files read; nobody changes the folder."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from data_prep.shard_format.manifest import Manifest
from tests.tiny_shards import write_tiny_shards


def pytest_collection_finish() -> None:
    """The libraries are imported by now. transformers' Trainer collects garbage at every start and end, and need not
    look through their million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    write_tiny_shards(path)
    return path


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return Manifest.load(folder)
