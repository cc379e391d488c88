"""Memory of one GPU, part by part, at the fullest moment of a step: pure arithmetic.

What DeepSpeed 0.19 holds was read from runtime/zero/stage_1_and_2.py and is measured by
tests/distributed/test_plan_memory.py; what autograd saves, by tests/unit/launch/test_planner_memory.py. Attention is
the fused kernel's (no L x L matrix is kept), as scaled_dot_product_attention runs on GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launch.planner.shapes import PlannedModel, num_parameters
from train.objective.fused_loss import CPU_BUFFER_BYTES, GPU_BUFFER_BYTES

GIB = 2**30
FRAMEWORK_GIB = 1.5
"""CUDA context, cuBLAS and NCCL buffers, and what the allocator cannot use: an assumption, not measured here."""
ALIGNMENT = 2  # elements per rank to which ZeRO pads its flat buffer


@dataclass(frozen=True)
class EngineSettings:
    """What DeepSpeed's JSON decides about memory and communication."""

    stage: int
    bytes_per_element: int
    """Of a weight, an activation and a gradient: 2 in fp16 and bf16, 4 in fp32."""
    accumulation_bytes: int
    """Of an accumulated gradient."""
    reduce_bucket_size: int
    """Elements reduced at a time."""
    overlap: bool
    """Whether gradients are reduced while the backward pass goes on."""
    precision: str
    """fp16, bf16 or fp32."""


@dataclass(frozen=True)
class Objective:
    """What the objective computes."""

    soft_targets: Literal["all", "masked", "none"]
    """Positions whose teacher's logits are learnt from."""
    num_masked: int
    mlm: bool
    cosine: bool
    mse: bool = False


def engine_settings(engine_config: Mapping[str, Any]) -> EngineSettings:
    """The settings in a DeepSpeed JSON; defaults as in DeepSpeed 0.19."""
    precision = "fp32"
    for name in ("fp16", "bf16"):
        if engine_config.get(name, {}).get("enabled"):
            precision = name
    bytes_per_element = 4 if precision == "fp32" else 2
    accumulation = engine_config.get("data_types", {}).get("grad_accum_dtype") or precision
    zero = engine_config.get("zero_optimization", {})
    return EngineSettings(
        stage=int(zero.get("stage", 0)),
        bytes_per_element=bytes_per_element,
        accumulation_bytes=4 if accumulation in ("fp32", "float32") else 2,
        reduce_bucket_size=int(zero.get("reduce_bucket_size", 5e8)),
        overlap=bool(zero.get("overlap_comm", False)),
        precision=precision,
    )


def partition_size(parameters: int, world_size: int) -> int:
    """Elements of the flat buffer that one rank owns, padding included."""
    step = ALIGNMENT * world_size
    return -(-parameters // step) * step // world_size


def model_state_bytes(student: PlannedModel, world_size: int, engine: EngineSettings) -> dict[str, int]:
    """What stays from step to step: the student's weights, and this rank's shards of master and moments."""
    shard = partition_size(num_parameters(student), world_size)
    return {
        "student weights": shard * world_size * engine.bytes_per_element,
        "fp32 master (shard)": shard * 4,
        "LAMB moments (shard)": shard * 8,
    }


def gradient_bytes(
    student: PlannedModel, world_size: int, engine: EngineSettings, accumulation: int
) -> dict[str, int]:
    """What the backward pass and the reduction of gradients hold.

    Exact where gradients accumulate in a wider format than they have (the shipped fp16 and bf16 JSON); where the
    formats are the same, DeepSpeed keeps whole tensors at the border of a partition: an upper bound.
    """
    parameters = num_parameters(student)
    shard = partition_size(parameters, world_size)
    largest = student.vocabulary * student.width
    widened = engine.accumulation_bytes != engine.bytes_per_element
    if engine.stage == 1:
        kept = parameters
    elif widened:
        kept = shard
    else:
        # The embedding comes first; what crosses a border behind it is at most an inner matrix.
        inner = student.width * student.feed_forward
        borders = min(2, world_size - 1)
        kept = min(parameters, shard + (largest + inner if largest > shard else borders * inner))
    # Added to in place where the formats differ; else the new gradients lie beside the accumulated ones.
    accumulated = kept * engine.accumulation_bytes * (1 if widened else min(2, accumulation))
    buckets = (2 if engine.overlap else 1) * engine.reduce_bucket_size * engine.bytes_per_element
    # Slices of a bucket that go to several ranks are copied into one tensor before they are sent.
    sent = min(engine.reduce_bucket_size, parameters) * engine.bytes_per_element if world_size > 1 else 0
    in_flight = largest * engine.bytes_per_element  # the embedding's own gradient, until it is in the bucket
    name = "fp32" if engine.accumulation_bytes == 4 else engine.precision
    return {f"gradients, {name} accumulation": accumulated, "gradient buckets": buckets + sent + in_flight}


def activation_bytes(
    student: PlannedModel,
    micro_batch_size: int,
    sequence_length: int,
    bytes_per_element: int,
    dropout_mask_bytes: int = 1,
) -> int:
    """What autograd keeps of the student's encoder until its backward pass, the last hidden states included.

    Per token and layer of width d, inner width f: 8 d (query, key, value, attention's result, both LayerNorms'
    inputs and outputs) and 2 f (before and after the activation) numbers; a dropout mask of d entries (BERT's and
    RoBERTa's layers have two, DistilBERT's one); the LayerNorms' means and deviations and one log-sum per head.

    Args:
        dropout_mask_bytes: per entry: 1 on a GPU; on a CPU the mask is kept in the activations' own format.
    """
    d, f = student.width, student.feed_forward
    masks = 1 if student.model_type == "distilbert" else 2
    statistics = 4 * (2 * 2 + student.heads)
    layer = (8 * d + 2 * f) * bytes_per_element + masks * d * dropout_mask_bytes + statistics
    embeddings = 2 * d * bytes_per_element + d * dropout_mask_bytes + 4 * 2 + 8  # 8: the token ids
    return micro_batch_size * sequence_length * (student.layers * layer + embeddings)


def objective_rows(objective: Objective, micro_batch_size: int, sequence_length: int) -> int:
    """Tokens whose logits are computed."""
    if objective.soft_targets == "all":
        return micro_batch_size * sequence_length
    if objective.soft_targets == "masked" or objective.mlm:
        return micro_batch_size * objective.num_masked
    return 0


def head_bytes(
    student: PlannedModel,
    objective: Objective,
    micro_batch_size: int,
    sequence_length: int,
    bytes_per_element: int,
) -> int:
    """What the student's MLM transform and the cosine term keep for the backward pass."""
    d = student.width
    transform = objective_rows(objective, micro_batch_size, sequence_length) * (
        3 * d * bytes_per_element + 4 * 2
    )
    cosine = micro_batch_size * sequence_length * d * 4 if objective.cosine else 0
    return transform + cosine


def loss_gradient_bytes(
    student: PlannedModel, objective: Objective, micro_batch_size: int, sequence_length: int
) -> int:
    """The fused loss's fp32 gradients of decoder, bias and features, made in the forward pass."""
    rows = objective_rows(objective, micro_batch_size, sequence_length)
    if rows == 0:
        return 0
    return 4 * (student.vocabulary * (student.width + 1) + rows * student.width)


def logits_chunk_bytes(
    student: PlannedModel,
    objective: Objective,
    micro_batch_size: int,
    sequence_length: int,
    bytes_per_element: int,
    on_gpu: bool = True,
) -> int:
    """The fused loss's buffers for one chunk of tokens, and what its half-precision products need beside them."""
    rows = objective_rows(objective, micro_batch_size, sequence_length)
    if rows == 0:
        return 0
    fitting = max(1, (GPU_BUFFER_BYTES if on_gpu else CPU_BUFFER_BYTES) // (4 * student.vocabulary))
    chunk = -(-rows // -(-rows // fitting))
    soft = objective.soft_targets != "none"
    buffers = 2 + soft + (soft and objective.mse)
    one = chunk * student.vocabulary * 4
    if bytes_per_element == 4:
        return buffers * one
    # The gradient once more in half precision, and the decoder's gradient of one chunk before it is added.
    return buffers * one + max(one, one // 2 + student.vocabulary * student.width * 4)


def teacher_bytes(
    teachers: tuple[PlannedModel, ...],
    objective: Objective,
    micro_batch_size: int,
    sequence_length: int,
    bytes_per_element: int,
) -> dict[str, int]:
    """Weights of the frozen teachers and what the objective reads of them: last hidden states and features."""
    tokens, rows = (
        micro_batch_size * sequence_length,
        objective_rows(objective, micro_batch_size, sequence_length),
    )
    soft = rows if objective.soft_targets != "none" else 0
    return {
        "teacher weights": sum(num_parameters(teacher) for teacher in teachers) * bytes_per_element,
        "teacher outputs": sum((tokens + soft) * teacher.width for teacher in teachers) * bytes_per_element,
    }


def memory_parts(
    student: PlannedModel,
    teachers: tuple[PlannedModel, ...],
    objective: Objective,
    engine: EngineSettings,
    *,
    world_size: int,
    micro_batch_size: int,
    sequence_length: int,
    accumulation: int,
    teacher_bytes_per_element: int,
    on_gpu: bool = True,
) -> dict[str, int]:
    """Bytes of one GPU (or of a rank on a CPU) by part.

    All are counted as if they were there together, although on a GPU the logits chunk is gone when the gradient
    buckets come: too much by the smaller of the two.
    """
    place = (micro_batch_size, sequence_length)
    bytes_per_element = engine.bytes_per_element
    parts = {
        **model_state_bytes(student, world_size, engine),
        **gradient_bytes(student, world_size, engine, accumulation),
        **teacher_bytes(teachers, objective, *place, teacher_bytes_per_element),
        "activations": activation_bytes(student, *place, bytes_per_element)
        + head_bytes(student, objective, *place, bytes_per_element),
        "loss gradients": loss_gradient_bytes(student, objective, *place),
        "logits chunk": logits_chunk_bytes(student, objective, *place, bytes_per_element, on_gpu),
        "CUDA and NCCL (assumed)": round(FRAMEWORK_GIB * GIB) if on_gpu else 0,
    }
    return {name: size for name, size in parts.items() if size}


def largest_fitting_micro_batch(sizes: Mapping[int, int], memory_bytes: float) -> int | None:
    """Of {micro batch: bytes needed} the largest that fits; None where none does."""
    return max((micro for micro, needed in sizes.items() if needed <= memory_bytes), default=None)
