"""Number formats on a CPU: what its matrix products gain or lose in bf16, measured at the start of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from train.models.flops import measured_matrix_rate

SIZE = 384
"""Of the square products: 0.1 GFLOP each, a third of a second on a processor that emulates bf16."""
WORTH_IT = 2.0
"""Below this much between products, a step has nothing to gain: all that is not a product is slower in bf16."""
IN_BF16 = "deepspeed.config=ds_configs/cpu-bf16.json and model.teacher_dtype=bf16"
IN_FP32 = "deepspeed.config=ds_configs/cpu.json and model.teacher_dtype=fp32"


def product_rates() -> tuple[float, float]:
    """FLOP/s of this processor's matrix products in fp32 and in bf16, by this process's threads."""
    fp32, bf16 = (measured_matrix_rate("cpu", dtype, SIZE) for dtype in (torch.float32, torch.bfloat16))
    return fp32, bf16


def precision_remark(models: Sequence[nn.Module]) -> str | None:
    """What the number formats of a run's student and teachers cost on a CPU; None where there is nothing to gain."""
    formats = {next(model.parameters()).dtype for model in models}
    if not formats <= {torch.float32, torch.bfloat16}:
        return None
    fp32, bf16 = product_rates()
    rates = (
        f"matrix products on this processor, one rank's threads: {fp32 / 1e9:,.0f} GFLOP/s in fp32, "
        f"{bf16 / 1e9:,.0f} in bf16"
    )
    if torch.bfloat16 in formats and bf16 < fp32:
        return f"warning: {rates}: {IN_FP32} are faster"
    if torch.float32 in formats and bf16 > WORTH_IT * fp32:
        return f"{rates}: {IN_BF16} may be faster"
    return None
