"""Where each tensor lies in what a DeepSpeed engine gives its optimizer, and what Lamb refuses by name there.

DeepSpeed 0.19, runtime/zero/stage_1_and_2.py: every param group is flattened into one buffer, padded and
cut into equal partitions, and the inner optimizer is given this rank's fp32 partition as its only parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Fragment:
    """The part [start, stop) of a flat partition that holds elements of tensor number `tensor`."""

    tensor: int
    start: int
    stop: int


@dataclass(frozen=True)
class ZeroLayout:
    """Where the tensors lie in what the optimizer is given.

    `fragments` is None when the engine hands over one parameter per tensor; then `tensors` says which, in order.
    """

    tensors: tuple[int, ...]
    fragments: tuple[Fragment, ...] | None
    group: Any
    """The process group over which the sums of squares are added; None where every rank holds all."""
    replicas: Any
    """The process group of all ranks that train the same model; None: all there are."""


def read_layout(
    engine: Any, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]
) -> ZeroLayout:
    """Find `optimizer` inside `engine` and read where each of `parameters` lies.

    Raises:
        ValueError: the engine does not hold this optimizer, or is configured in a way that no LAMB can be
            exact under; the message names the setting and what to do.
    """
    if not hasattr(engine, "optimizer"):
        raise ValueError(
            f"bind got {type(engine).__name__}: it takes the engine, the first of what deepspeed.initialize returns"
        )
    if getattr(engine, "mp_world_size", 1) > 1:
        raise ValueError(
            f"tensor parallelism over {engine.mp_world_size} ranks splits the tensors themselves, and their "
            "norms with them: use data parallelism alone"
        )
    number = {id(parameter): index for index, parameter in enumerate(parameters)}
    wrapper = engine.optimizer
    if wrapper is optimizer:
        return ZeroLayout(
            _numbers(number, optimizer.param_groups[0]["params"]), None, None, _data_group(engine)
        )
    kind = type(wrapper).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3" or hasattr(wrapper, "fp16_partitioned_groups"):
        raise ValueError(
            "zero_optimization.stage 3 cuts every tensor into per-rank shards, where this LAMB cannot find "
            "them: set zero_optimization.stage to 1 or 2"
        )
    if getattr(wrapper, "optimizer", None) is not optimizer:
        raise ValueError(
            f"the engine's {kind} does not wrap this Lamb: pass it as deepspeed.initialize(optimizer=...), "
            "and bind the same one"
        )
    if not hasattr(wrapper, "round_robin_bit16_offsets"):
        raise ValueError(
            f"the engine wraps its optimizer in {kind}, whose layout Lamb does not know: use "
            "zero_optimization.stage 2 (or stage 0, or stage 1 without fp32 accumulation of bf16 gradients)"
        )
    _check_settings(wrapper)
    group = wrapper.real_dp_process_group[0]
    size = int(wrapper.partition_size[0])
    tensors = _numbers(number, wrapper.round_robin_bit16_groups[0])
    numels = [meta.numel() for meta in wrapper.round_robin_bit16_meta[0]]
    start = dist.get_rank(group=group) * size
    fragments = partition_fragments(tensors, wrapper.round_robin_bit16_offsets[0], numels, start, size)
    flat = optimizer.param_groups[0]["params"][0]
    if flat.numel() != size or flat.dtype != torch.float32:
        raise ValueError(
            f"the engine's partition is {flat.dtype} of {flat.numel()} elements where fp32 of {size} is "
            "expected: keep fp32 master weights (no fp16/bf16_master_weights_and_grads)"
        )
    return ZeroLayout(tensors, fragments, group if dist.get_world_size(group=group) > 1 else None, group)


def _data_group(engine: Any) -> Any:
    return getattr(engine, "seq_data_parallel_group", None) or getattr(engine, "data_parallel_group", None)


def _numbers(number: dict[int, int], parameters: Sequence[torch.Tensor]) -> tuple[int, ...]:
    missing = [tuple(parameter.shape) for parameter in parameters if id(parameter) not in number]
    if missing:
        raise ValueError(
            f"the engine trains {len(missing)} tensors that Lamb was not given (the first has shape "
            f"{missing[0]}): build Lamb from the named_parameters() of the model the engine holds"
        )
    return tuple(number[id(parameter)] for parameter in parameters)


REFUSED = (
    (
        "round_robin_gradients",
        "reorders the partition",
        "set zero_optimization.round_robin_gradients to false",
    ),
    ("has_moe_layers", "splits experts over other process groups (MoE)", "train without MoE layers"),
    ("cpu_offload", "keeps the state on the CPU", "remove zero_optimization.offload_optimizer"),
    (
        "torch_autocast_gradscaler",
        "may skip a step on one rank alone",
        "use the fp16 section instead of torch_autocast with float16",
    ),
    ("zenflow", "updates parts of a tensor at different steps", "remove zero_optimization.zenflow"),
    (
        "elastic_checkpoint",
        "drops the optimizer's step",
        "set zero_optimization.elastic_checkpoint to false",
    ),
)
"""Settings of a ZeRO-1/2 wrapper under which an update would be wrong or is untested: attribute, reason, remedy."""


def refused_setting(zero: Any) -> str | None:
    """The first of REFUSED that is on, with its reason and remedy; None where there is none."""
    for attribute, reason, remedy in REFUSED:
        if getattr(zero, attribute, False):
            return f"{attribute}, which {reason}: {remedy}"
    return None


def _check_settings(zero: Any) -> None:
    if (refused := refused_setting(zero)) is not None:
        raise ValueError(f"Lamb cannot be exact with {refused}")
    if len(zero.bit16_groups) != 1:
        raise ValueError(
            f"the engine made {len(zero.bit16_groups)} parameter groups where Lamb has one: do not regroup "
            "its parameters (Lamb keeps per-tensor rules itself)"
        )


def partition_fragments(
    tensors: Sequence[int],
    offsets: Sequence[int],
    numels: Sequence[int],
    partition_start: int,
    partition_size: int,
) -> tuple[Fragment, ...]:
    """The parts of one rank's partition, in partition coordinates; padding belongs to no fragment.

    Args:
        tensors: number of each tensor in the flat buffer.
        offsets: where each begins in the whole flat buffer (elements); gaps are alignment padding.
        numels: elements of each.
        partition_start: where this rank's partition begins in the whole buffer.
        partition_size: elements of the partition.
    """
    fragments = []
    for tensor, offset, numel in zip(tensors, offsets, numels, strict=True):
        start = max(offset - partition_start, 0)
        stop = min(offset + numel - partition_start, partition_size)
        if start < stop:
            fragments.append(Fragment(tensor, start, stop))
    return tuple(fragments)
