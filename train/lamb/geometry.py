"""Which parameter tensors an optimizer updates, how, and where each lies in a flat partition.

Pure arithmetic on names, shapes and offsets: nothing here knows an optimizer or an engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

# A module or parameter whose name ends so is a normalisation layer: LayerNorm, layer_norm, sa_layer_norm,
# input_layernorm, attn_norm, final_norm, RMSNorm, norm1, ln_f. "normalizer" or "norm_scale_proj" is not.
_NORM = re.compile(r"norm_?\d*$|^ln(\d*|_\w+)$", re.IGNORECASE)


@dataclass(frozen=True)
class TensorRule:
    """How one parameter tensor takes part in LAMB."""

    name: str
    numel: int
    decay: bool
    """Weight decay enters its update."""
    adapt: bool
    """Its step is scaled by a trust ratio; otherwise the ratio is 1."""


@dataclass(frozen=True)
class Piece:
    """The part [start, stop) of a flat partition that holds elements of tensor number `tensor`."""

    tensor: int
    start: int
    stop: int


def is_bias_or_norm(name: str, ndim: int) -> bool:
    """Whether a parameter is a bias or belongs to a normalisation layer, whatever its family calls it.

    Either criterion is enough: the name (a last component `bias`, or a component that names a normalisation
    layer) or a shape of at most one dimension, which in these models nothing else has.
    """
    components = name.split(".")
    return components[-1] == "bias" or ndim <= 1 or any(_NORM.search(part) for part in components)


def tensor_rules(
    named_parameters: Sequence[tuple[str, torch.Tensor]], *, adapt_all: bool, decay_all: bool
) -> tuple[TensorRule, ...]:
    """The rule of each tensor: biases and norms take neither decay nor adaptation unless asked.

    Args:
        adapt_all: scale every tensor's step by its own trust ratio.
        decay_all: apply weight decay to every tensor.
    """
    return tuple(
        TensorRule(
            name=name,
            numel=parameter.numel(),
            decay=decay_all or not is_bias_or_norm(name, parameter.ndim),
            adapt=adapt_all or not is_bias_or_norm(name, parameter.ndim),
        )
        for name, parameter in named_parameters
    )


def optimized_parameters(
    named_parameters: Iterable[tuple[str, torch.Tensor]],
) -> list[tuple[str, torch.Tensor]]:
    """The trainable, non-empty tensors, each once: a tied weight keeps the first of its names.

    Raises:
        ValueError: bare tensors instead of (name, tensor) pairs, two tensors of one name, or of one memory,
            FSDP's flat parameters, or none to train.
    """
    first_name: dict[int, str] = {}
    at: dict[tuple[torch.device, int], str] = {}
    kept: dict[str, torch.Tensor] = {}
    for item in named_parameters:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise ValueError(
                f"Lamb needs (name, parameter) pairs and got {type(item).__name__}: pass "
                "model.named_parameters(), not model.parameters() (the names decide decay and adaptation)"
            )
        name, parameter = item
        if name.split(".")[-1] == "_flat_param":
            raise ValueError(
                f"{name} is FSDP's flat shard of many tensors, in which Lamb cannot find them: train with "
                "DeepSpeed's ZeRO stage 1 or 2"
            )
        if not parameter.requires_grad or parameter.numel() == 0 or id(parameter) in first_name:
            continue
        if name in kept:
            raise ValueError(f"two different parameters are named {name!r}: give every tensor its own name")
        place = (parameter.device, parameter.data_ptr())
        if place in at and place[1] != 0:
            raise ValueError(
                f"{at[place]} and {name} are two parameters that share their memory, which would be updated twice: tie "
                "them by making both names one Parameter"
            )
        first_name[id(parameter)] = at[place] = name
        kept[name] = parameter
    if not kept:
        raise ValueError("Lamb got no trainable parameter: every one is frozen, empty or missing")
    return list(kept.items())


def partition_pieces(
    tensors: Sequence[int],
    offsets: Sequence[int],
    numels: Sequence[int],
    partition_start: int,
    partition_size: int,
) -> tuple[Piece, ...]:
    """The parts of one rank's partition, in partition coordinates; padding belongs to no piece.

    Args:
        tensors: number of each tensor in the flat buffer.
        offsets: where each begins in the whole flat buffer (elements); gaps are alignment padding.
        numels: elements of each.
        partition_start: where this rank's partition begins in the whole buffer.
        partition_size: elements of the partition.
    """
    pieces = []
    for tensor, offset, numel in zip(tensors, offsets, numels, strict=True):
        start = max(offset - partition_start, 0)
        stop = min(offset + numel - partition_start, partition_size)
        if start < stop:
            pieces.append(Piece(tensor, start, stop))
    return tuple(pieces)
