"""Tiny shards that several test files read, whose folder nobody changes; and what a test must leave as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_prep.shard_format.manifest import Manifest
from tests.tiny_shards import write_tiny_shards


def pytest_collection_finish() -> None:
    """The libraries are imported by now. transformers' Trainer collects garbage at every start and end, and need not
    look through their million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def the_same_threads_afterwards() -> Iterator[None]:
    """With more of them, every process that a later test forks hangs in torch: OpenMP waits for threads it has not."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    write_tiny_shards(path)
    return path


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return Manifest.load(folder)
