"""Memory of one GPU, part by part, at the fullest moment of a step: pure arithmetic.

What DeepSpeed 0.19 holds was read from runtime/zero/stage_1_and_2.py and is measured by
tests/distributed/test_plan_memory.py; what autograd saves, by tests/unit/launch/planner/test_memory.py. Attention is
the fused kernel's (no L x L matrix is kept), as scaled_dot_product_attention runs on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.planner.models import PlannedModel
from train.config_sections.objective import ObjectiveConfig
from train.engine_config import EngineSettings, partition_size
from train.objective.build import relation_heads
from train.objective.fused_loss import CPU_BUFFER_BYTES, GPU_BUFFER_BYTES
from train.objective.relations import CPU_MAPS_BYTES, GPU_MAPS_BYTES

GIB = 2**30
FRAMEWORK_GIB = 1.5
"""CUDA context, cuBLAS and NCCL buffers, and what the allocator cannot use: an assumption, not measured here."""


@dataclass(frozen=True)
class Step:
    """An optimizer step as one rank's memory sees it."""

    student: PlannedModel
    teachers: tuple[PlannedModel, ...]
    objective: ObjectiveConfig
    num_masked: int
    """Masked positions of each sequence."""
    engine: EngineSettings
    world_size: int
    micro_batch_size: int
    sequence_length: int
    accumulation: int
    teacher_bytes_per_element: int
    on_gpu: bool = True
    dropout_mask_bytes: int = 1
    """Per entry: 1 on a GPU; on a CPU the mask is kept in the activations' own format."""

    @property
    def tokens(self) -> int:
        """Of a micro batch."""
        return self.micro_batch_size * self.sequence_length

    @property
    def decoded_tokens(self) -> int:
        """Tokens of a micro batch whose logits are computed."""
        if self.objective.soft_targets == "all":
            return self.tokens
        if self.objective.soft_targets == "masked" or self.objective.mlm_weight > 0:
            return self.micro_batch_size * self.num_masked
        return 0


def memory_parts(step: Step) -> dict[str, int]:
    """Bytes of one GPU (or of a rank on a CPU) by part.

    All are counted as if they were there together, although on a GPU the logits chunk is gone when the gradient
    buckets come: too much by the smaller of the two.
    """
    parts = {
        **model_state_bytes(step),
        **gradient_bytes(step),
        **teacher_bytes(step),
        "activations": activation_bytes(step) + head_bytes(step),
        "loss gradients": loss_gradient_bytes(step),
        "relations": relation_bytes(step),
        "logits chunk": logits_chunk_bytes(step),
        "CUDA and NCCL (assumed)": round(FRAMEWORK_GIB * GIB) if step.on_gpu else 0,
    }
    return {name: size for name, size in parts.items() if size}


def model_state_bytes(step: Step) -> dict[str, int]:
    """What stays from step to step: the student's weights, and this rank's shards of master and moments.

    LAMB and AdamW keep two moments each; AdamW's second parameter group is padded by itself, some bytes that are not
    counted."""
    shard = partition_size(step.student.parameters, step.world_size)
    return {
        "student weights": shard * step.world_size * step.engine.bytes_per_element,
        "fp32 master (shard)": shard * 4,
        "moments (shard)": shard * 8,
    }


def gradient_bytes(step: Step) -> dict[str, int]:
    """What the backward pass and the reduction of gradients hold.

    Exact where gradients accumulate in a wider format than they have (the shipped fp16 and bf16 JSON); where the
    formats are the same, DeepSpeed keeps whole tensors at the border of a partition: an upper bound.
    """
    student, engine, world_size = step.student, step.engine, step.world_size
    shard = partition_size(student.parameters, world_size)
    largest = student.vocabulary * student.embedding
    widened = engine.accumulation_bytes != engine.bytes_per_element
    if engine.stage == 1:
        kept = student.parameters
    elif widened:
        kept = shard
    else:
        # The embedding comes first; what crosses a border behind it is at most an inner matrix.
        inner = student.width * student.feed_forward
        borders = min(2, world_size - 1)
        kept = min(student.parameters, shard + (largest + inner if largest > shard else borders * inner))
    # Added to in place where the formats differ; else the new gradients lie beside the accumulated ones.
    accumulated = kept * engine.accumulation_bytes * (1 if widened else min(2, step.accumulation))
    buckets = (2 if engine.overlap else 1) * engine.reduce_bucket_size
    copied = engine.reduces_copies and world_size > 1
    sent = min(engine.reduce_bucket_size, student.parameters) if copied else 0
    in_flight = largest  # the embedding's own gradient, until it is in the bucket
    name = "fp32" if engine.accumulation_bytes == 4 else engine.precision
    return {
        f"gradients, {name} accumulation": accumulated,
        "gradient buckets": (buckets + sent + in_flight) * engine.bytes_per_element,
    }


def activation_bytes(step: Step) -> int:
    """What autograd keeps of the student's encoder until its backward pass, the last hidden states included.

    Per token and layer of width d, inner width f: 8 d (query, key, value, attention's result, both LayerNorms'
    inputs and outputs) and 2 f (before and after the activation) numbers; a dropout mask of d entries (BERT's and
    RoBERTa's layers have two, DistilBERT's one); the LayerNorms' means and deviations and one log-sum per head.
    """
    student, bytes_per_element = step.student, step.engine.bytes_per_element
    d, f = student.width, student.feed_forward
    masks = 1 if student.model_type == "distilbert" else 2
    statistics = 4 * (2 * 2 + student.heads)
    layer = (8 * d + 2 * f) * bytes_per_element + masks * d * step.dropout_mask_bytes + statistics
    embeddings = 2 * d * bytes_per_element + d * step.dropout_mask_bytes + 4 * 2 + 8  # 8: the token ids
    return step.tokens * (student.layers * layer + embeddings)


def head_bytes(step: Step) -> int:
    """What the student's MLM transform and the cosine term keep for the backward pass, and what the pooled states'
    gradient in fp32 takes."""
    d, objective = step.student.width, step.objective
    transform = step.decoded_tokens * (3 * d * step.engine.bytes_per_element + 4 * 2)
    return transform + step.tokens * d * 4 * (
        (objective.cosine_weight > 0) + (objective.embedding_weight > 0)
    )


def loss_gradient_bytes(step: Step) -> int:
    """The fused loss's fp32 gradients of decoder, bias and features, made in the forward pass."""
    if step.decoded_tokens == 0:
        return 0
    e = step.student.embedding
    return 4 * (step.student.vocabulary * (e + 1) + step.decoded_tokens * e)


def relation_bytes(step: Step) -> int:
    """What the relation term holds: both models' queries, keys and values, their gradients in fp32, one kind of them
    cut into heads, and three buffers of maps."""
    if step.objective.relation_weight == 0:
        return 0
    own, theirs = step.student.width, sum(teacher.width for teacher in step.teachers)
    vectors = (
        3 * step.tokens * (own * step.engine.bytes_per_element + theirs * step.teacher_bytes_per_element)
    )
    in_fp32 = 4 * step.tokens * (3 * own + 2 * own + max(teacher.width for teacher in step.teachers))
    heads = relation_heads(
        step.objective.relation_heads, [own, *(teacher.width for teacher in step.teachers)]
    )
    maps = 4 * step.micro_batch_size * heads * step.sequence_length**2
    return vectors + in_fp32 + 3 * min(maps, GPU_MAPS_BYTES if step.on_gpu else CPU_MAPS_BYTES)


def logits_chunk_bytes(step: Step) -> int:
    """The fused loss's buffers for one chunk of tokens, and what its half-precision products need beside them."""
    if step.decoded_tokens == 0:
        return 0
    vocabulary = step.student.vocabulary
    fitting = max(1, (GPU_BUFFER_BYTES if step.on_gpu else CPU_BUFFER_BYTES) // (4 * vocabulary))
    chunk = -(-step.decoded_tokens // -(-step.decoded_tokens // fitting))
    soft = step.objective.soft_targets != "none"
    # One for each model where C loops do the rest (train/objective/vocabulary_native.py).
    in_loops = not step.on_gpu and (not soft or len(step.teachers) < 2)
    buffers = 1 + soft if in_loops else 2 + soft + (soft and step.objective.mse_weight > 0)
    one = chunk * vocabulary * 4
    if step.engine.bytes_per_element == 4:
        return buffers * one
    # The gradient once more in half precision, and the decoder's gradient of one chunk before it is added.
    return buffers * one + max(one, one // 2 + vocabulary * step.student.embedding * 4)


def teacher_bytes(step: Step) -> dict[str, int]:
    """Weights of the frozen teachers and what the objective reads of them: last hidden states and features."""
    read = step.tokens + (step.decoded_tokens if step.objective.soft_targets != "none" else 0)
    elements = {
        "teacher weights": sum(teacher.parameters for teacher in step.teachers),
        "teacher outputs": sum(read * teacher.width for teacher in step.teachers),
    }
    return {name: count * step.teacher_bytes_per_element for name, count in elements.items()}
