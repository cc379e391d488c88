"""A run that reports are made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.launch.reporting.given import finished_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return finished_run(tmp_path)
