"""The objective of a recipe for its student and teacher; refused where it cannot compare them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from train.config_sections.objective import ObjectiveConfig
from train.errors import UserError
from train.models.attention_vectors import AttentionVectors
from train.models.families import family_of
from train.models.flops import RelationLayers
from train.models.teacher import Teacher
from train.objective.distillation import DistillationLoss, Relations

MAX_RELATION_HEADS = 48
"""What MiniLMv2 (Wang et al. 2021, section 4) takes for widths of 768."""


def build_objective(
    settings: ObjectiveConfig, student: PreTrainedModel, teacher: Teacher | None, seed: int = 0
) -> DistillationLoss:
    """The objective, with a projection to each teacher's width where the recipe asks for one.

    Args:
        teacher: None where no term needs one.
        seed: of the projection's first weights.
    Raises:
        UserError: vocabularies or widths that differ, layers that do not exist, relation heads that do not divide.
    """
    if not settings.needs_teacher:
        return DistillationLoss(settings)
    assert teacher is not None
    family = family_of(student)
    vocabulary = student.config.vocab_size
    if settings.needs_teacher_logits and vocabulary != teacher.vocab_size:
        raise UserError(
            f"the student has a vocabulary of {vocabulary} tokens, the teacher {teacher.names[0]} one of "
            f"{teacher.vocab_size}; soft targets need the same"
        )
    _check_layer_pairs(settings, family.num_layers(student), teacher)
    widths = [(family.width(student), width) for width in teacher.widths]
    relations = _relations(settings, student, teacher) if settings.relation_weight > 0 else None
    pooling = teacher.pooling if settings.embedding_weight > 0 else None
    own, theirs = widths[0]
    if pooling is not None and own != theirs:
        raise UserError(
            f"objective.embedding_weight={settings.embedding_weight}: the student's vectors are {own} wide, those of "
            f"teacher {teacher.names[0]} {theirs}, and a projection would not leave with the student; leave out "
            "model.student_width, or take objective.relation_weight, which goes with any width"
        )
    if settings.projection:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return DistillationLoss(settings, widths, relations, pooling)
    for name, (own, theirs) in zip(teacher.names, widths, strict=True):
        if settings.needs_hidden and own != theirs:
            terms = ("cosine_weight", "layer_cosine_weight")
            weights = " and ".join(f"objective.{term}=0" for term in terms if getattr(settings, term) > 0)
            raise UserError(
                f"the student's hidden states are {own} wide, those of teacher {name} {theirs}: their cosine "
                f"needs a learned projection (objective.projection=true), or set {weights}"
            )
    return DistillationLoss(settings, relations=relations, pooling=pooling)


def _check_layer_pairs(settings: ObjectiveConfig, student_layers: int, teacher: Teacher) -> None:
    assert teacher.output_hidden_states or not settings.layer_pairs
    teacher_layers = min(teacher.num_layers)
    for own, theirs in settings.layer_pairs:
        if not (0 <= own <= student_layers and 0 <= theirs <= teacher_layers):
            raise UserError(
                f"objective.layer_pairs names ({own}, {theirs}); the student has layers 0 to {student_layers}, the "
                f"teacher 0 to {teacher_layers} (0: embeddings)"
            )


def _relations(settings: ObjectiveConfig, student: PreTrainedModel, teacher: Teacher) -> Relations:
    family = family_of(student)
    num_layers = family.num_layers(student)
    layers = {own for own, _ in settings.relation_pairs(num_layers, teacher.num_layers)}
    if len(layers) > 1:
        raise UserError(
            f"objective.relation_layers={settings.relation_layers}: the student gives the relations of one layer; "
            "name the same student layer in every pair"
        )
    layer = layers.pop()
    if layer > num_layers:
        raise UserError(
            f"objective.relation_layers names layer {layer} of the student, which has {num_layers}"
        )
    heads = relation_heads(settings.relation_heads, [family.width(student), *teacher.widths])
    return Relations(AttentionVectors(family, student, layer), heads)


def relation_layers(
    settings: ObjectiveConfig, student_layers: int, teacher_layers: Sequence[int]
) -> RelationLayers | None:
    """What the FLOPs of the relation term depend on; None where it is off."""
    if settings.relation_weight == 0:
        return None
    pairs = settings.relation_pairs(student_layers, teacher_layers)
    return RelationLayers(
        pairs[0][0],
        tuple(theirs for _, theirs in pairs),
        student_alone=not settings.needs_student_output,
        teachers_alone=not settings.needs_teacher_output,
    )


def relation_heads(asked: int | None, widths: Sequence[int]) -> int:
    """Relation heads for models of these widths; UserError where `asked` does not divide them."""
    common = math.gcd(*widths)
    fitting = [heads for heads in range(1, common + 1) if common % heads == 0]
    if asked is None:
        return max(heads for heads in fitting if heads <= MAX_RELATION_HEADS)
    if asked not in fitting:
        raise UserError(
            f"objective.relation_heads={asked} does not divide the widths {', '.join(map(str, widths))}; these do: "
            f"{', '.join(map(str, fitting))}"
        )
    return asked
