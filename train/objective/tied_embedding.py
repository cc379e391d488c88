"""One gradient tensor for a weight that is both embedding and decoder.

Autograd would make two of the vocabulary's size, zero one of them, and add them up: on a CPU some 6 % of a
whole step. Here the embedding's backward pass, which is the last of all, adds its few rows to the decoder's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class TiedGradient:
    """Carries the decoder's gradient of one step from its backward pass to the embedding's."""

    gradient: torch.Tensor | None = None
    """(V, width), fp32 or wider."""

    def take(self) -> torch.Tensor | None:
        gradient, self.gradient = self.gradient, None
        return gradient


@torch.compiler.disable
def tied_lookup(embedding: nn.Embedding, input_ids: torch.Tensor, tied: TiedGradient) -> torch.Tensor:
    """embedding(input_ids), (B, L, width), whose backward pass adds to the gradient that `tied` brings."""
    return _TiedLookup.apply(embedding.weight, input_ids, embedding.padding_idx, tied)


class _TiedLookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, input_ids: torch.Tensor, padding_idx: int | None, tied: TiedGradient
    ) -> torch.Tensor:
        ctx.save_for_backward(input_ids)
        ctx.like, ctx.padding_idx, ctx.tied = (weight.shape, weight.dtype), padding_idx, tied
        return nn.functional.embedding(input_ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (input_ids,) = ctx.saved_tensors
        shape, dtype = ctx.like
        total = ctx.tied.take()
        if total is None:  # the loss did not read the decoder
            total = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=grad.device)
        rows = input_ids.flatten()
        parts = grad.flatten(0, -2).to(total.dtype)
        if ctx.padding_idx is not None:  # nn.Embedding gives this row no gradient
            parts = parts.masked_fill((rows == ctx.padding_idx)[:, None], 0.0)
        return total.index_add_(0, rows, parts).to(dtype), None, None, None
