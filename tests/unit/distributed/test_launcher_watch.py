"""Ranks whose launcher is gone."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from launch import pretrain
from train.distributed.launcher_watch import LauncherWatch
from train.distributed.signals import StopRequest


def test_a_launcher_that_is_killed_during_the_imports_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take up to minutes; what lives after them would seem to be the whole launcher."""
    given: list[Any] = []
    run = SimpleNamespace(run=lambda config, launcher: given.append(launcher))
    monkeypatch.setitem(sys.modules, "train.run", run)
    monkeypatch.setattr(pretrain, "launcher_chain", lambda: (7, 5))
    monkeypatch.setattr("train.distributed.launcher_watch.launcher_chain", lambda: (7, 1))
    pretrain.main([])
    with StopRequest() as stop, LauncherWatch(stop, *given):
        deadline = time.monotonic() + 10
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.05)
    assert stop.requested
