"""What a run on a CPU says about bf16."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from train.config import Config
from train.config_sections.model import ModelConfig
from train.errors import UserError
from train.models.build import build_teacher
from train.models.cpu import precision


@pytest.mark.parametrize(
    ("formats", "bf16_rate", "said"),
    [
        (
            ("fp32", "fp32"),
            500.0,
            "100 GFLOP/s in fp32, 500 in bf16: deepspeed.config=ds_configs/cpu-bf16.json and",
        ),
        (("bf16", "fp32"), 500.0, "model.teacher_dtype=bf16 may be faster"),
        (("bf16", "bf16"), 500.0, None),
        (("fp32",), 150.0, None),
        (("bf16", "bf16"), 0.3, "warning: .*: deepspeed.config=ds_configs/cpu.json .* are faster"),
        (("fp32",), 0.3, None),
    ],
)
def test_what_is_said(
    formats: tuple[str, ...], bf16_rate: float, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {torch.float32: 100e9, torch.bfloat16: bf16_rate * 1e9}
    monkeypatch.setattr(precision, "measured_matrix_rate", lambda device, dtype, size: rates[dtype])
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    remark = precision.precision_remark([nn.Linear(2, 2).to(dtypes[name]) for name in formats])
    if said is None:
        assert remark is None
    else:
        assert remark is not None
        assert re.search(said, remark)


def test_no_float16_on_a_cpu() -> None:
    config = Config(model=ModelConfig(teacher="none", teacher_dtype="fp16"))
    with pytest.raises(UserError, match=r"teacher_dtype='fp16'.*give bf16, fp32 or auto"):
        build_teacher(config, "cpu")
