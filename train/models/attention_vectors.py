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
    """A linear layer that keeps its last output."""

    output: torch.Tensor | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.output = super().forward(input)
        return self.output


class AttentionVectors:
    """The queries, keys and values of a model's layer; made once, it records from then on.

    Before the rotation of models with rotary positions: rotated keys would tie what is learnt to the distance of two
    tokens and to the size of the model's own heads, which relation heads do not share.

    Args:
        layer: counted from 1.
    """

    def __init__(self, family: Family, model: PreTrainedModel, layer: int) -> None:
        block = family.layer_list(model)[layer - 1]
        self._projections = [attrgetter(path)(block) for path in family.projections]
        for projection in self._projections:
            assert type(projection) in (nn.Linear, RecordedLinear), type(projection)
            projection.__class__ = RecordedLinear

    def take(self) -> tuple[torch.Tensor, ...]:
        """Three tensors (batch, sequence, width) of the last forward pass; they are let go of here."""
        outputs = [projection.output for projection in self._projections]
        for projection in self._projections:
            projection.output = None
        return tuple(outputs[0].chunk(3, -1)) if len(outputs) == 1 else tuple(outputs)
