"""train.build.start_engine: which optimizer, and what it refuses of the recipe and of the engine's JSON."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train.build
from launch.common.cli import parse_config
from tests.distributed.pretraining import small_settings
from train.build import assemble, read_inputs, start_engine
from train.config import Config
from train.config_sections.training import OptimizerConfig
from train.distributed.world import World
from train.errors import UserError
from train.loop.startup_timing import StartupTimer
from train.loop.timing import Clock
from train.optimizer import build_optimizer


class FakeDeepSpeed:
    """Gives the optimizer to an engine that is like what the JSON asks for."""

    def initialize(self, args: Any, model: Any, optimizer: Any, config: dict[str, Any]) -> tuple[Any]:
        if config.get("stage") == 3:
            return (SimpleNamespace(optimizer=SimpleNamespace(fp16_partitioned_groups=[])),)
        if config.get("broken"):
            optimizer.param_groups[0]["params"] = None  # no mistake of the user's
        if config.get("zero") is not None:
            optimizer.param_groups[0]["params"] = [torch.ones(4, dtype=config["dtype"])]
            zero = SimpleNamespace(optimizer=optimizer, round_robin_bit16_offsets=[], **config["zero"])
            return (SimpleNamespace(optimizer=zero),)
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
    with pytest.raises(TypeError):
        start_engine(config, module, {"broken": True}, "cpu")  # type: ignore[arg-type]


def test_the_peak_that_utilisation_is_measured_against_is_the_engines(
    shards_folder: str, teacher_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student is in fp32 until the engine rounds it."""
    measured: list[torch.dtype] = []
    sizes = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), lambda: 1)
    monkeypatch.setattr(
        train.build,
        "start_engine",
        lambda config, module, *_: SimpleNamespace(module=module.bfloat16(), **sizes),
    )
    monkeypatch.setattr(
        train.build, "measured_matrix_rate", lambda device, dtype: measured.append(dtype) or 1e9
    )
    words = [*small_settings(shards_folder, teacher_folder), "--deepspeed.config=ds_configs/cpu-bf16.json"]
    config = parse_config(words, "")
    world = World(rank=0, local_rank=0, world_size=1, local_size=1, device="cpu")
    assemble(config, read_inputs(config, "cpu"), world, clock=Clock("cpu"), startup=StartupTimer())
    assert measured == [torch.bfloat16]


def test_layers_are_compiled_after_the_pass_that_finds_what_is_trained(
    shards_folder: str, teacher_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 tokens, for which code would be made that never runs again."""

    def num_compiled(model: torch.nn.Module) -> int:
        return sum(module._compiled_call_impl is not None for module in model.modules())

    freeze, before = train.build.freeze_untrained, []

    def noted(objective: Any, student: Any, teacher: Any, device: str) -> list[str]:
        before.append(num_compiled(student) + num_compiled(teacher.models[0]))
        return freeze(objective, student, teacher, device)

    monkeypatch.setattr(train.build, "freeze_untrained", noted)
    monkeypatch.setenv("CXX", sys.executable)  # nothing is compiled before it runs
    words = small_settings(shards_folder, teacher_folder)
    config = parse_config([*words, "--model.teacher_compile=true", "--model.student_compile=true"], "")
    world = World(rank=0, local_rank=0, world_size=1, local_size=1, device="cpu")
    sizes = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), lambda: 1)
    monkeypatch.setattr(
        train.build, "start_engine", lambda config, module, *_: SimpleNamespace(module=module, **sizes)
    )
    parts = assemble(config, read_inputs(config, "cpu"), world, clock=Clock("cpu"), startup=StartupTimer())
    assert parts.teacher is not None
    assert before == [0]
    assert (num_compiled(parts.student), num_compiled(parts.teacher.models[0])) == (2, 4)


class Mixed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(2, 3)
        self.sa_layer_norm = torch.nn.LayerNorm(3)
        self.frozen = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)


ADAMW = replace(Config(), optimizer=OptimizerConfig(name="adamw", lr=1e-3, betas=(0.8, 0.9)))


def test_adamw_is_torchs_fused_one_with_lambs_exclusions() -> None:
    module = Mixed()
    optimizer = build_optimizer(ADAMW.optimizer, module.named_parameters())
    assert type(optimizer) is torch.optim.AdamW
    decayed, plain = optimizer.param_groups
    assert [id(p) for p in decayed["params"]] == [id(module.dense.weight)]
    assert len(plain["params"]) == 3
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    for group in (decayed, plain):
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (1e-3, (0.8, 0.9), 1e-6, True)
    alone = build_optimizer(ADAMW.optimizer, module.dense.named_parameters(prefix="x"))
    assert len(alone.param_groups) == 2
    assert len(build_optimizer(ADAMW.optimizer, [("weight", module.dense.weight)]).param_groups) == 1


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({}, r"wraps its optimizer in AdamW, .*use zero_optimization.stage 2"),
        (
            {"zero": {"cpu_offload": True}},
            r"not tested with cpu_offload, .*remove zero_optimization.offload_opt",
        ),
        ({"zero": {"elastic_checkpoint": True}}, r"elastic_checkpoint, which drops the optimizer's step"),
        ({"zero": {}, "dtype": torch.float16}, r"partition is torch.float16 .*keep fp32 master weights"),
    ],
)
def test_what_adamw_refuses_of_the_engine(engine: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        start_engine(ADAMW, torch.nn.Linear(2, 2, bias=False), {"dtype": torch.float32, **engine}, "cpu")  # type: ignore[arg-type]


def test_adamws_state_is_there_before_the_first_step() -> None:
    """The engine links the state of its first group alone to what it saves, and only after a step."""
    settings = {"zero": {}, "dtype": torch.float32}
    engine = start_engine(ADAMW, torch.nn.Linear(2, 2, bias=False), settings, "cpu")  # type: ignore[arg-type]
    optimizer = engine.optimizer.optimizer
    (partition,) = optimizer.param_groups[0]["params"]
    assert {key: value.shape for key, value in optimizer.state[partition].items()} == {
        "step": (),
        "exp_avg": (4,),
        "exp_avg_sq": (4,),
    }
