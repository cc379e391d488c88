"""Ranks whose launcher is gone."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from launch import pretrain
from train.distributed import launcher_watch
from train.distributed.signals import StopRequest


def test_a_launcher_that_is_killed_during_the_imports_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take up to minutes; what lives after them would seem to be the whole launcher."""
    chain, given = [(7, 5)], []

    def imported_meanwhile(*_: Any) -> None:
        chain[0] = (7, 1)

    run = SimpleNamespace(run=lambda config, launcher: given.append(launcher))
    monkeypatch.setitem(sys.modules, "train.run", run)
    monkeypatch.setattr(pretrain, "parse_config", imported_meanwhile)
    for module in (pretrain, launcher_watch):
        monkeypatch.setattr(module, "launcher_chain", lambda: chain[0])
    pretrain.main([])
    with StopRequest() as stop, launcher_watch.LauncherWatch(stop, *given):
        deadline = time.monotonic() + 10
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.05)
    assert stop.requested
