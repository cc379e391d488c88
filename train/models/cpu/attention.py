"""A student's attention on a CPU by whole maps, where torch's own is slower.

With dropout torch falls back to whole maps itself, with a slow dropout. In bf16 the backward pass of its flash kernel
takes up to three times as long as in fp32 for short sequences; by maps both passes take 9 ms beside its 68 at
64 x 12 heads x 32 x 32, 70 beside 87 at 4 x 12 x 512 x 64 (one thread of a Xeon with AMX).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from train.models.cpu.dropout import dropout as fast_dropout

NAME = "sdpa_by_maps"
"""In transformers."""
MAX_LENGTH = 512
"""Of a sequence in bf16: maps of longer ones take more memory than they are worth in time."""


def with_cpu_attention(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, its attention done here from now on where it was scaled_dot_product_attention."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
    return model


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa_attention_forward, by whole maps in training on a CPU: in fp32 with dropout, by the operations
    of torch's own fallback (ATen, `_scaled_dot_product_attention_math`), which are the same to the bit; in bf16 with
    maps in bf16 (softmax and sums of products in fp32), as transformers' eager attention has them.

    Args:
        query, key, value: (batch, heads, sequence, width of a head).
    Returns:
        (batch, sequence, heads, width of a head), and no weights.
    """
    ours = query.device.type == "cpu" and getattr(module, "is_causal", True) is False
    ours = ours and query.shape == key.shape == value.shape and kwargs.get("position_bias") is None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if ours and query.dtype == torch.bfloat16 and query.requires_grad and query.shape[-2] <= MAX_LENGTH:
        mixed = _in_bf16(query * scale, key, value, attention_mask, dropout)
    # Under autocast torch's own fallback computes in fp32.
    elif ours and dropout and attention_mask is None and not torch.is_autocast_enabled("cpu"):
        mixed = _as_torch(query, key, value, dropout, math.sqrt(scale))
    else:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return mixed.transpose(1, 2).contiguous(), None


def _in_bf16(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, p: float
) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):  # of softmax, which it would give and take in fp32
        scores = query @ key.transpose(-2, -1)
        if mask is not None:
            # Not infinity, of which a row that sees nothing (padding, in a local layer) would be no numbers.
            least = torch.finfo(scores.dtype).min
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, least)
            else:
                scores = scores + mask.to(scores.dtype).clamp(min=least)
        weights = torch.softmax(scores, -1)
        return (fast_dropout(weights, p) if p else weights) @ value


def _as_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, p: float, root: float
) -> torch.Tensor:
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    weights = torch.softmax((query * root) @ (key.transpose(-2, -1) * root), -1)
    return (fast_dropout(weights, p) @ value).to(dtype)
