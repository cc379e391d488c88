"""train.build.start_engine: what Lamb refuses of the recipe and of the engine's JSON is the user's error."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train.build
from train.build import start_engine
from train.config import Config
from train.errors import UserError


class FakeDeepSpeed:
    """Gives the optimizer to an engine that is like what the JSON asks for."""

    def initialize(self, args: Any, model: Any, optimizer: Any, config: dict[str, Any]) -> tuple[Any]:
        if config.get("stage") == 3:
            return (SimpleNamespace(optimizer=SimpleNamespace(fp16_partitioned_groups=[])),)
        if config.get("broken"):
            optimizer.param_groups[0]["params"] = None  # no mistake of the user's
        return (SimpleNamespace(optimizer=optimizer),)


@pytest.fixture(autouse=True)
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.build, "import_deepspeed", lambda log_level: FakeDeepSpeed())


def test_what_lamb_refuses_is_a_user_error() -> None:
    module, config = torch.nn.Linear(2, 2), Config()
    start_engine(config, module, {}, "cpu")  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"zero_optimization.stage 3 .* set zero_optimization.stage to 1 or 2"
    ):
        start_engine(config, module, {"stage": 3}, "cpu")  # type: ignore[arg-type]
    clamped = replace(config, optimizer=replace(config.optimizer, clamp=(1.0, 0.5)))
    with pytest.raises(UserError, match=r"clamp is \(1.0, 0.5\): give \(low, high\)"):
        start_engine(clamped, module, {}, "cpu")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        start_engine(config, module, {"broken": True}, "cpu")  # type: ignore[arg-type]
