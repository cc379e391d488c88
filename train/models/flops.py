"""How many floating-point operations a token costs, and how many the machine could do.

A matrix product of (m, k) and (k, n) counts 2 m k n. Per token and layer of width d, with a feed-forward
width f and a sequence of L tokens: 8 d^2 (query, key, value, output) + 4 d f (two feed-forward products)
+ 4 L d (scores and their weighted sum), and 2 d f for gates beside the feed-forward units. Lookups, norms,
softmax and activations are left out, as in the model-FLOPs utilisation of Chowdhery et al. 2022
(arXiv:2204.02311, appendix B), and DeBERTa's products with relative positions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from train.models.families import family_of


@dataclass(frozen=True)
class ModelShape:
    """What the count depends on."""

    layers: int
    width: int
    feed_forward: int
    vocabulary: int
    embedding: int
    """Width of the embeddings and of the decoder; ELECTRA's and DeBERTa's may be narrower than `width`."""
    gated: bool = False
    """Whether the feed-forward units have gates, by a map of the same size (ModernBERT)."""


@dataclass(frozen=True)
class RelationLayers:
    """The layers, counted from 1, whose relations are learnt."""

    student: int
    teachers: tuple[int, ...]
    student_alone: bool
    """Whether nothing that comes after that layer's queries, keys and values is computed."""
    teachers_alone: bool


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape of any model of train/models/families.py."""
    config, family = model.config, family_of(model)
    embedding: Any = model.get_input_embeddings()
    return ModelShape(
        family.num_layers(model),
        family.width(model),
        int(getattr(config, family.feed_forward_field)),
        int(config.vocab_size),
        int(embedding.weight.shape[1]),
        gated=family.gated,
    )


def forward_flops_per_token(
    shape: ModelShape, sequence_length: int, decoded_share: float, ends_at: int | None = None
) -> float:
    """FLOPs of one forward pass per token.

    Args:
        decoded_share: share of the positions whose logits are computed: 1 for all, 0.15 for masked ones.
        ends_at: layer, counted from 1, of which nothing but queries, keys and values is computed, and nothing after
            them; None for the whole encoder.
    """
    d, f, e = shape.width, shape.feed_forward, shape.embedding
    layer = 8 * d * d + (6 if shape.gated else 4) * d * f + 4 * sequence_length * d
    encoder = shape.layers * layer if ends_at is None else (ends_at - 1) * layer + 6 * d * d
    if e != d:
        encoder += 2 * e * d
    head = 2 * d * e + 2 * e * shape.vocabulary
    return encoder + decoded_share * head


@dataclass(frozen=True)
class FlopsPerToken:
    """Model FLOPs of one training step per token of its sequences."""

    student: float
    """Forward and backward: three forward passes."""
    teachers: float
    """Forward."""

    @property
    def total(self) -> float:
        return self.student + self.teachers


def training_flops_per_token(
    student: ModelShape,
    teachers: Sequence[ModelShape],
    sequence_length: int,
    num_masked: int,
    soft_targets: Literal["all", "masked", "none"],
    relations: RelationLayers | None = None,
) -> FlopsPerToken:
    """Of a step of distillation; both models' logits are computed only where the objective reads them.

    Args:
        num_masked: masked positions of each sequence; 0 where no term predicts tokens.
        relations: for the layers whose queries, keys and values are learnt from: three products of each vector with
            all others, and one more for each of the student's gradients.
        soft_targets: positions whose teacher's logits are learnt from.
    """
    masked = num_masked / sequence_length
    share = 1.0 if soft_targets == "all" else masked
    soft = 0.0 if soft_targets == "none" else share
    student_end: int | None = None
    teacher_ends: list[int | None] = [None] * len(teachers)
    if relations is not None:
        student_end = relations.student if relations.student_alone else None
        teacher_ends = list(relations.teachers) if relations.teachers_alone else teacher_ends
    of_student = 3 * forward_flops_per_token(student, sequence_length, share, student_end)
    of_teachers = sum(
        forward_flops_per_token(teacher, sequence_length, soft, end)
        for teacher, end in zip(teachers, teacher_ends, strict=True)
    )
    if relations is not None:
        of_student += len(teachers) * 3 * 4 * sequence_length * student.width
        of_teachers += sum(3 * 2 * sequence_length * teacher.width for teacher in teachers)
    return FlopsPerToken(of_student, of_teachers)


def random_operand(shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Normal numbers: a GPU at its power limit multiplies constant ones faster than any that a model has."""
    return torch.randn(*shape, dtype=dtype, device=device)


def measured_matrix_rate(device: str, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s that this rank reaches in a square matrix product: the fastest of 5, after one to warm up. What else the
    machine does can only slow a product down."""
    on_gpu = device.startswith("cuda")
    size = size or (8192 if on_gpu else 768)
    left, right = (random_operand((size, size), dtype, device) for _ in range(2))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(left, right)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])
