"""Queries, keys and values of one layer, as its own forward pass computes them.

The layer's projections keep their last output: no hook, which torch.compile would not run, and no second product.
Parameters, their names and what the model computes stay as they are.
"""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import nn
from transformers import PreTrainedModel

from train.models.families import Family


class RecordedLinear(nn.Linear):
    """A linear layer that keeps what it made in its last calls, as many as a forward pass makes."""

    calls: int = 1
    outputs: tuple[torch.Tensor, ...] = ()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = super().forward(input)
        self.outputs = (*self.outputs, output)[-self.calls :]
        return output


class AttentionVectors:
    """The queries, keys and values of a model's layer; made once, it records from then on.

    Before the rotation of models with rotary positions: rotated keys would tie what is learnt to the distance of two
    tokens and to the size of the model's own heads, which relation heads do not share. For the same reason of DeBERTa's
    disentangled attention the content's vectors alone: not those of relative positions, nor the products with them.
    MPNet's learned bias and the window of ModernBERT's local layers stay outside of them, too: relations are between
    all pairs of tokens.

    Args:
        layer: counted from 1.
    """

    def __init__(self, family: Family, model: PreTrainedModel, layer: int) -> None:
        block = family.layer_list(model)[layer - 1]
        self._projections = [attrgetter(path)(block) for path in family.projections]
        for projection in self._projections:
            assert type(projection) in (nn.Linear, RecordedLinear), type(projection)
            projection.__class__ = RecordedLinear
        for projection in self._projections[:2]:
            projection.calls = family.projection_calls(model.config)

    def take(self) -> tuple[torch.Tensor, ...]:
        """Three tensors (batch, sequence, width) of the last forward pass; they are let go of here."""
        outputs = [projection.outputs[0] for projection in self._projections]
        for projection in self._projections:
            projection.outputs = ()
        return tuple(outputs[0].chunk(3, -1)) if len(outputs) == 1 else tuple(outputs)
