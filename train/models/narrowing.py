"""A narrower copy of a model: the hidden dimensions, heads and feed-forward units that carry most of it are kept.

What carries how much is measured on text, without gradients, as in Minitron (Muralidharan et al. 2024,
arXiv:2407.14679, section 2.2). One set of hidden dimensions holds for the whole residual stream: embeddings, every
layer's inputs and outputs, norms and the head's transform. Heads and units are chosen in each layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from train.errors import UserError
from train.models.families import Family
from train.models.teacher import running_copy

BATCH = 16


@dataclass(frozen=True)
class Importance:
    """How much each part of a model carries; float64, larger is more. The same on every rank, or ranks differ."""

    hidden: np.ndarray
    """(width,) dimensions of the residual stream."""
    queries: np.ndarray
    """(layers, width) dimensions of the heads' queries and keys."""
    values: np.ndarray
    """(layers, width) dimensions of the heads' values."""
    units: np.ndarray
    """(layers, feed-forward width)."""


@dataclass(frozen=True)
class Kept:
    """Indices that a narrower model keeps, ascending; those of the layers (layers, number)."""

    hidden: np.ndarray
    queries: np.ndarray
    values: np.ndarray
    units: np.ndarray


@torch.inference_mode()
def measure(family: Family, model: PreTrainedModel, input_ids: torch.Tensor, device: str) -> Importance:
    """What each part of a model carries on a text.

    A hidden dimension counts with its mean absolute value, summed over the embeddings' and all layers' outputs; a
    value's dimension and a feed-forward unit with the mean square of what it adds to the residual stream; a
    dimension of queries and keys with the mean squares of both, multiplied.

    Args:
        model: fp32, on the CPU.
        input_ids: (windows, L) int, nothing padded.
        device: where it is run, in fp32.
    """
    running = running_copy(model, device, torch.float32)
    was_training = running.training
    running.eval()
    sums: dict[tuple[str, int], torch.Tensor] = {}

    def add(name: str, layer: int, vectors: torch.Tensor) -> None:
        total = vectors.flatten(0, -2).square().sum(0, dtype=torch.float64)
        sums[name, layer] = sums.get((name, layer), 0) + total

    def add_input(name: str, layer: int) -> Any:
        return lambda module, inputs: add(name, layer, inputs[0])

    def add_output(name: str, layer: int) -> Any:
        return lambda module, inputs, output: add(name, layer, output)

    hooks = []
    layers = family.layer_list(running)
    outputs = {"values": family.attention_output, "units": family.feed_forward[1]}
    for index, layer in enumerate(layers):
        for name, path in outputs.items():
            hooks.append(attrgetter(path)(layer).register_forward_pre_hook(add_input(name, index)))
        for path in family.projections:
            hooks.append(attrgetter(path)(layer).register_forward_hook(add_output(path, index)))
    hidden: Any = 0
    for batch in input_ids.split(BATCH):
        encoded = family.encode(running, batch.to(device).long(), output_hidden_states=True)
        assert encoded.hidden_states is not None
        for states in encoded.hidden_states:
            hidden = hidden + states.flatten(0, -2).abs().sum(0, dtype=torch.float64)
    for hook in hooks:
        hook.remove()
    running.train(was_training)

    def per_layer(name: str) -> np.ndarray:
        return torch.stack([sums[name, index] for index in range(len(layers))]).cpu().numpy()

    def added(name: str) -> np.ndarray:
        weights = [attrgetter(outputs[name])(layer).weight for layer in layers]
        lengths = torch.stack([weight.square().sum(0, dtype=torch.float64) for weight in weights])
        return per_layer(name) * lengths.cpu().numpy()

    values = added("values")
    # One map to queries, keys and values keeps its heads whole, which the values choose.
    fused = len(family.projections) == 1
    queries = values if fused else per_layer(family.projections[0]) * per_layer(family.projections[1])
    return Importance(hidden.cpu().numpy(), queries, values, added("units"))


def choose(
    family: Family, wide: PretrainedConfig, narrow: PretrainedConfig, importance: Importance | None
) -> Kept:
    """What a model of the narrow config keeps of one of the wide config.

    Args:
        importance: None for the first ones, where the shapes alone count.
    """
    width, heads = wide.hidden_size, wide.num_attention_heads
    layers, units = getattr(wide, family.num_layers_field), getattr(wide, family.feed_forward_field)
    if importance is None:
        even = np.zeros((layers, width))
        importance = Importance(np.zeros(width), even, even, np.zeros((layers, units)))
    head_size = narrow.hidden_size // narrow.num_attention_heads
    values = importance.values.reshape(layers, heads, width // heads)
    queries = importance.queries.reshape(values.shape)
    kept_heads = _largest(values.sum(-1), narrow.num_attention_heads)[..., None]

    def within_heads(scores: np.ndarray) -> np.ndarray:
        dimensions = _largest(np.take_along_axis(scores, kept_heads, 1), head_size)
        return (kept_heads * (width // heads) + dimensions).reshape(layers, -1)

    return Kept(
        hidden=_largest(importance.hidden, narrow.hidden_size),
        queries=within_heads(queries),
        values=within_heads(values),
        units=_largest(importance.units, getattr(narrow, family.feed_forward_field)),
    )


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Places of the largest scores of the last axis, ascending; of equal ones the first."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :count], axis=-1)


def narrow_weights(
    family: Family, wide: PreTrainedModel, narrow: PreTrainedModel, kept: Kept
) -> dict[str, torch.Tensor]:
    """A wide model's weights cut to a narrower one's shapes, fp32: copies, to the bit where nothing is left out.

    Where heads get smaller, queries are scaled so that the attention's scores keep their size.

    Raises:
        UserError: a parameter that follows the width in a way that is not known here.
    """
    sizes = {name: wide.config.hidden_size for name in ("hidden", "queries", "values")}
    sizes["units"] = getattr(wide.config, family.feed_forward_field)
    head_sizes = [each.config.hidden_size // each.config.num_attention_heads for each in (narrow, wide)]
    state = {name: value.detach().float() for name, value in wide.state_dict().items()}
    cut = {}
    for name, like in narrow.state_dict().items():
        value = state[name]
        for axis, (size, length) in enumerate(zip(value.shape, like.shape, strict=True)):
            if size == length:
                continue
            kind, layer = _kind(family, name, axis)
            index = getattr(kept, kind) if layer is None else getattr(kept, kind)[layer]
            parts = size // sizes[kind]  # more than one where a map makes queries, keys and values, or a gate
            if size % sizes[kind] or length != parts * len(index):
                raise UserError(
                    f"a narrower {family.model_type} cannot inherit {name} {tuple(value.shape)}; use "
                    "model.layer_map=random"
                )
            index = np.concatenate([part * sizes[kind] + index for part in range(parts)])
            value = value.index_select(axis, torch.as_tensor(index, device=value.device))
        if head_sizes[0] != head_sizes[1] and _path(family, name)[1] == family.projections[0]:
            value = value * (head_sizes[0] / head_sizes[1]) ** 0.5
        cut[name] = value
    return cut


def _path(family: Family, name: str) -> tuple[int | None, str]:
    """(layer, path of the module within it) of a parameter; (None, "") outside of the layers."""
    prefix = f"{family.layers}."
    if not name.startswith(prefix):
        return None, ""
    layer, _, within = name.removeprefix(prefix).partition(".")
    return int(layer), within.rpartition(".")[0]


def _kind(family: Family, name: str, axis: int) -> tuple[str, int | None]:
    """Which field of `Kept` an axis of a parameter is cut by, and in which layer; None for all layers alike."""
    layer, path = _path(family, name)
    if axis == 0 and path in family.projections:
        return ("values" if path == family.projections[-1] else "queries"), layer
    if axis == 1 and path == family.attention_output:
        return "values", layer
    if path == family.feed_forward[axis]:
        return "units", layer
    return "hidden", None
