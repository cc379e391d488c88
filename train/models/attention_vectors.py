"""Queries, keys and values of one layer, as its own forward pass computes them.

The layer's projections keep their last output: no hook, which torch.compile would not run, and no second product.
Parameters, their names and what the model computes stay as they are. Where nothing else is read, what comes after them
is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

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


def forget_outputs(*models: nn.Module) -> None:
    """Let go of what a forward pass that failed has left: its outputs hold all that it had computed."""
    for model in models:
        for module in model.modules():
            if isinstance(module, RecordedLinear):
                module.outputs = ()


class SkippableLayer:
    """A layer of a model that returns its input while `skipped`; of its maps only `projections` are computed then."""

    skipped: bool = False
    norms: Sequence[nn.Module] = ()
    """That the projections read the input through; in a list, which makes no second parameter of it."""
    projections: Sequence[RecordedLinear] = ()
    layer_output: Any
    """Of the family, by hidden states."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.skipped:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        read = hidden_states
        for norm in self.norms:
            read = norm(read)
        for projection in self.projections:
            projection.outputs = ()
            projection(read)
        return self.layer_output(hidden_states)


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
        self._layers: list[Any] = list(family.layer_list(model)[layer - 1 :])
        block = self._layers[0]
        self._projections = [attrgetter(path)(block) for path in family.projections]
        for projection in self._projections:
            assert type(projection) in (nn.Linear, RecordedLinear), type(projection)
            projection.__class__ = RecordedLinear
        for projection in self._projections[:2]:
            projection.calls = family.projection_calls(model.config)
        for each in self._layers:
            if not isinstance(each, SkippableLayer):
                kind = type(each)
                each.__class__ = type(kind.__name__, (SkippableLayer, kind), {})
            each.layer_output = family.layer_output
        block.projections = self._projections
        if family.projection_norm is not None:
            block.norms = [attrgetter(family.projection_norm)(block)]

    def take(self) -> tuple[torch.Tensor, ...]:
        """Three tensors (batch, sequence, width) of the last forward pass; they are let go of here."""
        outputs = [projection.outputs[0] for projection in self._projections]
        for projection in self._projections:
            projection.outputs = ()
        return tuple(outputs[0].chunk(3, -1)) if len(outputs) == 1 else tuple(outputs)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Forward passes meanwhile compute nothing but what the vectors need: their hidden states are of no use."""
        for layer in self._layers:
            layer.skipped = True
        try:
            yield
        finally:
            for layer in self._layers:
                layer.skipped = False
