"""training.micro_batch_size=auto: the largest micro batch whose step fits into a GPU's memory.

Not yet run on a GPU; the search and the arithmetic are tested on a CPU, with a made-up memory.
"""

from __future__ import annotations

import gc
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from data_prep.shard_format.manifest import Manifest
from train.config import Config
from train.data.masking import MaskedBatch
from train.data.order import fitting_micro_batches, fitting_world_sizes
from train.distributed.world import World
from train.engine_config import EngineSettings, engine_settings, partition_size
from train.errors import UserError
from train.loop.memory_errors import is_out_of_memory
from train.loop.trainer import DistillationModule
from train.models.attention_vectors import forget_outputs
from train.models.build import TEACHER_DTYPES, TeacherFolder, build_student, build_teacher, count_parameters
from train.objective.build import build_objective

# What stays free for the allocator's fragments, NCCL's buffers and cuBLAS's workspace.
USABLE_SHARE = 0.92


def largest_fitting(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest size that fits, by bisection; None where not even the smallest does.

    The smallest is tried first: kernels and library handles, which take memory of their own, are loaded while there
    is room for them.

    Args:
        sizes: ascending.
        fits: true up to some size and false from there on.
    """
    if not fits(sizes[0]):
        return None
    return sizes[bisect(sizes, False, lo=1, key=lambda size: not fits(size)) - 1]


def engine_bytes(parameters: int, world_size: int, engine: EngineSettings) -> int:
    """What the engine holds on one rank beside the weights and their gradients: its partition of the fp32 weights,
    the optimizer's two moments and the accumulated gradient, and the buckets that gradients are reduced in."""
    shard = partition_size(parameters, world_size)
    buckets = (2 if engine.overlap else 1) * min(engine.reduce_bucket_size, parameters)
    return (4 + 8 + engine.accumulation_bytes) * shard + engine.bytes_per_element * buckets


def find_micro_batch_size(
    config: Config,
    manifest: Manifest,
    world: World,
    engine_config: dict[str, Any],
    teachers: Sequence[TeacherFolder] = (),
) -> Config:
    """The configuration with the largest micro batch that fits on every rank's GPU; every rank calls this.

    Args:
        engine_config: DeepSpeed's JSON as it was given; says the precision and the bucket size.
        teachers: the recipe's, where they have been opened before.
    Raises:
        UserError: there is no GPU, no size divides the batch, or not even one sequence fits.
    """
    if not world.device.startswith("cuda"):
        raise UserError(
            "training.micro_batch_size='auto' measures a GPU's memory, and there is none here: give a number"
        )
    sizes = fitting_micro_batches(config.training.global_batch_size, config.data.lanes, world.world_size)
    if not sizes:
        raise UserError(
            f"training.global_batch_size={config.training.global_batch_size} cannot be shared by {world.world_size} "
            f"ranks: these fit: {fitting_world_sizes(config.training.global_batch_size, config.data.lanes)}"
        )
    best = largest_fitting(sizes, _trial(config, manifest, world, engine_config, teachers))
    gc.collect()
    torch.cuda.empty_cache()  # NCCL and cuBLAS, which come next, allocate beside torch's cache
    torch.cuda.reset_peak_memory_stats(world.device)  # or the run would log the trials' peak as its own
    found = torch.tensor(best or 0, device=world.device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    if not int(found):
        raise UserError(
            f"training.micro_batch_size='auto': not even {sizes[0]} sequences of {config.data.sequence_length} tokens "
            f"fit on {world.device}; shorten data.sequence_length, or take a GPU with more memory"
        )
    return replace(config, training=replace(config.training, micro_batch_size=int(found)))


def _trial(
    config: Config,
    manifest: Manifest,
    world: World,
    engine_config: dict[str, Any],
    teachers: Sequence[TeacherFolder],
) -> Callable[[int], bool]:
    """fits(size): whether a forward and backward pass of that many sequences leaves room for the engine."""
    teacher = build_teacher(config, world.device, teachers) if config.objective.needs_teacher else None
    student = build_student(config, manifest, teachers)
    module = DistillationModule(student, build_objective(config.objective, student, teacher)).to(world.device)
    engine = engine_settings(engine_config)
    module.to(TEACHER_DTYPES[engine.precision])
    parameters = count_parameters(module)
    free, _ = torch.cuda.mem_get_info(world.device)
    usable = USABLE_SHARE * (free + torch.cuda.memory_reserved(world.device))
    usable -= engine_bytes(parameters, world.world_size, engine)
    length = config.data.sequence_length
    masked_per_row = max(1, round(config.masking.probability * length))

    def fits(size: int) -> bool:
        module.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
        input_ids = torch.randint(0, manifest.tokenizer.vocab_size, (size, length), device=world.device)
        positions = torch.arange(masked_per_row, device=world.device).expand(size, -1).contiguous()
        masked = MaskedBatch(
            input_ids, positions, input_ids.gather(1, positions), torch.ones_like(positions, dtype=torch.bool)
        )
        try:
            module(masked, teacher(input_ids) if teacher else None)["loss"].backward()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            forget_outputs(student, *(teacher.models if teacher else ()))
        return torch.cuda.max_memory_allocated(world.device) <= usable

    return fits
