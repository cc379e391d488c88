"""A narrower copy of a model: the hidden dimensions, heads and feed-forward units that carry most of it are kept.

What carries how much is measured on text (train/evaluation/importance.py). One set of hidden dimensions holds for the
whole residual stream: embeddings, every layer's inputs and outputs, norms and the head's transform. Heads and units
are chosen in each layer. Weights are copies: scaling the norms or the biases for what is left out did not help
(docs/NOTES.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from train.errors import UserError
from train.models.families import Family


@dataclass(frozen=True)
class Importance:
    """How much each part of a model carries; float64, more is larger."""

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


def set_sizes(
    config: PretrainedConfig,
    family: Family,
    width: int | None,
    heads: int | None,
    feed_forward: int | None,
    inherits: bool,
) -> None:
    """Fewer heads of the same size, and an inner width in proportion, unless they are given.

    Args:
        config: the student's at its teacher's width; changed here.
        inherits: whether its weights are its teacher's, so that no part may be larger.
    Raises:
        UserError: sizes that do not fit each other or the teacher.
    """
    old_width, old_heads = config.hidden_size, config.num_attention_heads
    old_units, head_size = getattr(config, family.feed_forward_field), old_width // old_heads
    width = old_width if width is None else width
    if heads is None:
        if width < 1 or width % head_size:
            raise UserError(
                f"model.student_width: a student's width must be a multiple of its heads' width {head_size}; it is "
                f"{width}: give one, or say into how many heads it is divided (model.student_heads)"
            )
        heads = width // head_size
    units = old_units * width // old_width if feed_forward is None else feed_forward
    size, remainder = divmod(width, heads)
    if remainder:
        raise UserError(f"model.student_heads={heads} does not divide the student's width {width}")
    if inherits:
        _check_inherits(family, (width, old_width), (heads, old_heads), (size, head_size), (units, old_units))
        # transformers builds the map from embeddings to hidden states only where their widths differ.
        if old_width != width == getattr(config, "embedding_size", None):
            raise UserError(
                f"model.student_width={width} is the width of the embeddings themselves, whose map to the hidden "
                "states would be lost: give another width, or model.layer_map=random"
            )
    # ELECTRA's embeddings may have a width of their own; DeBERTa's classifiers read their pooler's from the config.
    for name in ("embedding_size", "pooler_hidden_size"):
        if getattr(config, name, None) == old_width:
            setattr(config, name, width)
    if getattr(config, "attention_head_size", None) is not None:  # of some DeBERTas
        config.attention_head_size = size
    config.hidden_size, config.num_attention_heads = width, heads
    setattr(config, family.feed_forward_field, units)


def _check_inherits(
    family: Family,
    width: tuple[int, int],
    heads: tuple[int, int],
    head_size: tuple[int, int],
    units: tuple[int, int],
) -> None:
    """UserError where a student's size (first of each pair) cannot be a part of its teacher's (second)."""
    for name, (own, theirs) in (("width", width), ("heads", heads), ("feed_forward", units)):
        if own > theirs:
            raise UserError(
                f"model.student_{name}={own} is more than the teacher's {theirs}, of which a part is inherited; give "
                f"at most {theirs}, or model.layer_map=random"
            )
    if head_size[0] > head_size[1] or (family.rotary and head_size[0] != head_size[1]):
        remedy = f"give {math.ceil(width[0] / head_size[1])} or more"
        if family.rotary:
            remedy = "rotated heads stay whole: leave it out"
        raise UserError(
            f"model.student_heads={heads[0]} makes heads of {head_size[0]} dimensions of a width of {width[0]}; those "
            f"of the teacher, which are inherited, have {head_size[1]}; {remedy}, or give model.layer_map=random"
        )


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
    """A wide model's weights cut to what a narrow one keeps, fp32; where no size differs, the same to the bit.

    An axis is cut where the two models' sizes differ. Where heads get smaller, queries are scaled so that the
    attention's scores keep their size.

    Raises:
        UserError: a parameter that follows the width in a way that is not known here.
    """
    sizes, narrow_sizes = _sizes(family, wide.config), _sizes(family, narrow.config)
    head_size, narrow_head_size = (
        each.config.hidden_size // each.config.num_attention_heads for each in (wide, narrow)
    )
    state, cut = wide.state_dict(), {}
    assert state.keys() == narrow.state_dict().keys(), "set_sizes refuses widths at which the modules differ"
    for name, like in narrow.state_dict().items():
        value = state[name].detach().float()
        for axis, (size, length) in enumerate(zip(value.shape, like.shape, strict=True)):
            if size == length:
                continue
            kind, layer = _kind(family, name, axis)
            # Several where one map makes queries, keys and values, or units and gates.
            parts = size // sizes[kind]
            if (size, length) != (parts * sizes[kind], parts * narrow_sizes[kind]):
                raise UserError(
                    f"a narrower {family.model_type} cannot inherit {name} {tuple(value.shape)}; keep the "
                    f"{wide.config.num_attention_heads} heads (model.student_heads), or use model.layer_map=random"
                )
            index = getattr(kept, kind) if layer is None else getattr(kept, kind)[layer]
            index = np.concatenate([part * sizes[kind] + index for part in range(parts)])
            value = value.index_select(axis, torch.as_tensor(index, device=value.device))
        queries = (*family.projections[:1], *family.position_projections[:1])
        if narrow_head_size != head_size and _path(family, name)[1] in queries:
            value = value * (narrow_head_size / head_size) ** 0.5
        cut[name] = value
    return cut


def _sizes(family: Family, config: PretrainedConfig) -> dict[str, int]:
    """By field of `Kept`."""
    width, units = config.hidden_size, getattr(config, family.feed_forward_field)
    return {"hidden": width, "queries": width, "values": width, "units": units}


def _path(family: Family, name: str) -> tuple[int | None, str]:
    """(layer, path of the module within it) of a parameter, also of a bare encoder's; (None, "") outside of layers."""
    encoder = f"{family.encoder}."
    name, prefix = name.removeprefix(encoder), family.layers.removeprefix(encoder) + "."
    if not name.startswith(prefix):
        return None, ""
    layer, _, within = name.removeprefix(prefix).partition(".")
    return int(layer), within.rpartition(".")[0]


def _kind(family: Family, name: str, axis: int) -> tuple[str, int | None]:
    """Which field of `Kept` an axis of a parameter is cut by, and in which layer; None for all layers alike."""
    layer, path = _path(family, name)
    if axis == 0 and path in (*family.projections, *family.position_projections):
        return ("values" if path == family.projections[-1] else "queries"), layer
    if axis == 1 and path == family.attention_output:
        return "values", layer
    if path == family.feed_forward[axis]:
        return "units", layer
    return "hidden", None
