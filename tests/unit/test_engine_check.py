"""Damaged engine JSONs: each is taken, or refused before any model is loaded, with file and field."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT
from train.build import engine_config_for
from train.config import Config
from train.config_sections.running import DeepSpeedConfig
from train.data.pipeline import fit_micro_batch
from train.engine_config import engine_settings, read_engine_config
from train.errors import UserError

VALUES: list[Any] = [None, True, 0, -5, 10**30, 0.5, 1e300, "", "x", [], [[1]], {}, {"a": 1}]
OTHERS: dict[str, Any] = {
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    "dump_state": False,
    "flops_profiler": {"enabled": False, "profile_step": 1},
    "gradient_predivide_factor": 1.0,
    "torch_autocast": {"enabled": False},
    "wall_clock_breakdown": False,
}


def of_zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2, **settings}}


def settle(template: dict[str, Any], file: str = "mine.json") -> dict[str, Any]:
    """As a run does before it loads a model."""
    config = fit_micro_batch(Config(deepspeed=DeepSpeedConfig(config=file)), 64)
    resolved = engine_config_for(config, template, 64)
    engine_settings(resolved)
    return resolved


def refusal(template: dict[str, Any]) -> str | None:
    try:
        settle(template)
    except UserError as error:
        return str(error)
    return None


def paths(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from paths(item, (*path, key))


def damaged(number: int) -> tuple[dict[str, Any], str]:
    """A JSON with one value of another kind, one key deleted, nested in itself or misspelt; and that key."""
    drawn = random.Random(number)
    files = sorted((ROOT / "ds_configs").glob("*.json"))
    template = read_engine_config(files[number % len(files)]) | copy.deepcopy(OTHERS)
    path = drawn.choice(list(paths(template)))
    part = template
    for key in path[:-1]:
        part = part[key]
    name = path[-1]
    kind = drawn.choice(["value", "value", "value", "deleted", "nested", "misspelt"])
    value = part.pop(name)
    if kind != "deleted":
        made = {"value": drawn.choice(VALUES), "nested": {name: value}, "misspelt": value}[kind]
        part[name + "x" if kind == "misspelt" else name] = copy.deepcopy(made)
    return template, name


@pytest.mark.parametrize("first", range(0, 80, 20))
def test_damaged_jsons(first: int) -> None:
    refused = 0
    for number in range(first, first + 20):
        template, name = damaged(number)
        message = refusal(template)
        if message is not None:
            refused += 1
            assert message.startswith("deepspeed.config='mine.json': "), message
            assert name in message, message
            assert "\n" not in message
    assert refused > 5


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"wall_clock_breakdown": {}}, r"wall_clock_breakdown=\{\}; give true or false"),
        ({"torch_autocast": None}, "torch_autocast=None; give an object"),
        ({"communication_data_type": 7}, "communication_data_type=7; give fp16, bf16 or fp32"),
        (
            {"data_types": {"grad_accum_dtype": "x"}},
            "data_types.grad_accum_dtype='x'; give fp16, bf16 or fp32",
        ),
        (
            of_zero(overlap_com=True),
            "DeepSpeed refuses zero_optimization.overlap_com=True: overlap_com: Extra inputs are not permitted",
        ),
        ({"fp16": {"enabled": True, "hysteresis": "two"}}, "DeepSpeed refuses fp16.hysteresis='two': hyst"),
        (of_zero(reduce_bucket_size="5e8"), "reduce_bucket_size='5e8'; give a num"),
        (of_zero(reduce_bucket_size=10**30), "give a number above 0, up to 1,000"),
        (of_zero(allgather_bucket_size=3), "allgather_bucket_size=3; give an even"),
        (
            {"gradient_predivide_factor": 2.0},
            "gradient_predivide_factor=2.0 does not go with .*reduce_scatter",
        ),
        (
            {"prescale_gradients": True},
            "prescale_gradients=True does not go with .*reduce_scatter in stage 2",
        ),
        (
            {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
            "DeepSpeed refuses fp16.enabled=True: bfloat16 and fp16",
        ),
    ],
)
def test_the_field_is_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settle(of_zero() | section)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"fp16": {"enabled": true, "enabled": false}}', "is not JSON: 'enabled' stands there twice"),
        (b'{"gradient_predivide_factor": NaN}', "is not JSON: NaN is no number of JSON's"),
        (b'{"dump_state": "\xff"}', "is not JSON: 'utf-8' codec"),
        (b'{"dump_state": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (b'{"fp16": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is nested too deeply"),
    ],
    ids=["twice", "NaN", "bytes", "digits", "nested"],
)
def test_damaged_files(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(UserError, match=message) as refused:
        read_engine_config(tmp_path / "x.json")
    assert "x.json" in str(refused.value)


def test_what_is_well_is_taken() -> None:
    template = of_zero() | OTHERS
    resolved = settle(copy.deepcopy(template))
    assert json.loads(json.dumps(resolved))["train_batch_size"] == Config().training.global_batch_size
