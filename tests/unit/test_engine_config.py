"""DeepSpeed's JSON: what the recipe fills in, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT
from train.distributed.world import import_deepspeed
from train.engine_config import (
    IDLE,
    IDLE_KEYS,
    LOGGED,
    default_engine_config,
    engine_settings,
    read_engine_config,
    resolve_engine_config,
)

NUMBERS: dict[str, Any] = {
    "global_batch_size": 4096,
    "micro_batch_size": 32,
    "gradient_accumulation_steps": 16,
    "gradient_clipping": 1.0,
}
WELL: dict[str, Any] = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_config_resolves(path: Path) -> None:
    template = read_engine_config(path)
    resolved = resolve_engine_config(template, **NUMBERS)
    assert resolved["train_batch_size"] == 4096
    assert resolved["train_micro_batch_size_per_gpu"] == 32
    assert resolved["gradient_accumulation_steps"] == 16
    assert resolved["gradient_clipping"] == 1.0
    assert "optimizer" not in resolved
    assert "auto" not in json.dumps(resolved)
    assert resolved["zero_optimization"]["stage"] == 2
    assert template["train_batch_size"] == "auto", "the template must not be changed"


OWNED = ("train_batch_size", "gradient_clipping", "optimizer", "scheduler", "steps_per_print", "timers")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        *(({key: 7}, f'{key}=7 belongs to .*write "auto"') for key in OWNED),
        ({"zero_optimization": {"stage": "auto"}}, r'fills in "auto" at zero_optimization\.stage'),
        ({"zero_optimization": {"stage": 0}}, "stage=0; this trainer runs stages 1 and 2"),
        ({"zero_optimization": {"stage": 3}}, "stage=3; this trainer runs stages 1 and 2"),
        ({"zero_optimization": 2}, "zero_optimization=2; give an object"),
        *(
            (WELL | {key: True}, f"{key}=True; give an object such as")
            for key in ("fp16", "bf16", "data_types")
        ),
        (WELL | {"zero_optimisation": {}}, "section 'zero_optimisation'; did you mean 'zero_optimization'"),
        (WELL | {"quux": {}}, "unknown section 'quux'; remove it; known are bf16, communication_data_type"),
        *(
            (WELL | {key: {}}, f"{key} does nothing in this trainer: {re.escape(instead)}; leave {key} out")
            for key, instead in IDLE.items()
        ),
        *(
            (
                WELL | {section: {"stage": 2, key: True}},
                rf"{section}\.{key} is not for this trainer.*leave it out",
            )
            for section, key in (
                ("zero_optimization", "allgather_partitions"),
                ("zero_optimization", "stage3_max_live_parameters"),
                ("bf16", "bf16_optimizer_states"),
                ("fp16", "auto_cast"),
            )
        ),
    ],
)
def test_what_is_not_the_engines_to_say_or_does_nothing_is_refused(
    template: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_engine_config(template, **NUMBERS)


def test_the_optimizer_is_allowed_whatever_the_file_says() -> None:
    assert resolve_engine_config(WELL, **NUMBERS)["zero_allow_untested_optimizer"]


def test_a_missing_file_lists_those_that_are_shipped(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file.*ds_configs/cpu.json"):
        read_engine_config(tmp_path / "none.json")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_not_a_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="JSON"):
        read_engine_config(tmp_path / "x.json")


def test_default_by_device() -> None:
    assert default_engine_config("cuda").name == "fp16.json"
    assert default_engine_config("cpu").name == "cpu.json"


@pytest.mark.parametrize("key", LOGGED)
def test_what_only_a_log_shows_needs_the_log(key: str) -> None:
    template = WELL | {key: True}
    assert resolve_engine_config(template, **NUMBERS, log_level="info")[key]
    with pytest.raises(ValueError, match=f"{key} shows in .*give deepspeed.log_level=info"):
        resolve_engine_config(template, **NUMBERS, log_level="error")


def test_keys_without_effect_are_deepspeeds() -> None:
    """Those of another version would be refused by a wrong word."""
    deepspeed = import_deepspeed()
    assert deepspeed
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    classes = {
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "zero_optimization": DeepSpeedZeroConfig,
    }
    for section, keys in IDLE_KEYS.items():
        assert keys <= classes[section].model_fields.keys()


def test_settings_of_the_shipped_json() -> None:
    settings = [
        engine_settings(read_engine_config(ROOT / "ds_configs" / f"{name}.json"))
        for name in ("fp16", "bf16", "cpu")
    ]
    assert [s.precision for s in settings] == ["fp16", "bf16", "fp32"]
    assert [(s.bytes_per_element, s.accumulation_bytes) for s in settings] == [(2, 4), (2, 4), (4, 4)]
    assert all(s.stage == 2 and s.reduce_bucket_size == 50_000_000 for s in settings)


@pytest.mark.parametrize(("names", "size"), [("fp32 float32 float torch.float32", 4), ("bf16 bfloat16", 2)])
def test_a_number_format_has_several_names(names: str, size: int) -> None:
    for name in names.split():
        settings = engine_settings({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": name}})
        assert (settings.accumulation_bytes, settings.takes_stage_1) == (size, size == 2), name
