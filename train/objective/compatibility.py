"""Can this objective compare this student with this teacher? Asked once, before training."""

from __future__ import annotations

from transformers import PreTrainedModel

from train.errors import UserError
from train.models.families import family_of
from train.models.teacher import Teacher
from train.objective.distillation import DistillationLoss


def check_models(objective: DistillationLoss, student: PreTrainedModel, teacher: Teacher | None) -> None:
    """Refuse a student and a teacher that the objective cannot compare.

    Raises:
        UserError: no teacher where a term needs one, vocabularies or widths that differ, pairs of layers
            that do not exist, a projection that would do nothing.
    """
    if objective.projections and not objective.needs_hidden:
        raise UserError("objective.projection has no effect without a cosine term; turn it off")
    if not objective.needs_teacher:
        return
    if teacher is None:
        weights = ("kd_weight", "mse_weight", "cosine_weight", "layer_cosine_weight")
        on = [f"objective.{name}={getattr(objective, name)}" for name in weights if getattr(objective, name)]
        raise UserError(
            f"the objective needs a teacher (model.teacher) for {', '.join(on)}; name one, or set these to 0"
        )
    vocabulary = family_of(student).decoder(student)[0].shape[0]
    if objective.needs_teacher_logits and vocabulary != teacher.vocab_size:
        raise UserError(
            f"the student has a vocabulary of {vocabulary} tokens, the teacher {teacher.names[0]} one of "
            f"{teacher.vocab_size}; soft targets need the same"
        )
    if objective.needs_hidden:
        _check_widths(objective, student, teacher)
    _check_layer_pairs(objective, student, teacher)


def projection_widths(student: PreTrainedModel, teacher: Teacher) -> list[tuple[int, int]]:
    """What `DistillationLoss(projection_widths=...)` needs for these models."""
    return [(family_of(student).width(student), width) for width in teacher.widths]


def _check_widths(objective: DistillationLoss, student: PreTrainedModel, teacher: Teacher) -> None:
    needed = projection_widths(student, teacher)
    if objective.projections:
        assert objective.projection_widths == needed
        return
    for name, (own, theirs) in zip(teacher.names, needed, strict=True):
        if own != theirs:
            raise UserError(
                f"the student's hidden states are {own} wide, those of teacher {name} {theirs}: their cosine "
                "needs a learned projection (objective.projection=true), or set objective.cosine_weight=0"
            )


def _check_layer_pairs(objective: DistillationLoss, student: PreTrainedModel, teacher: Teacher) -> None:
    depth, teacher_depth = family_of(student).num_layers(student), min(teacher.num_layers)
    for own, theirs in objective.layer_pairs:
        if not (0 <= own <= depth and 0 <= theirs <= teacher_depth):
            raise UserError(
                f"objective.layer_pairs names ({own}, {theirs}); the student has layers 0 to {depth}, the "
                f"teacher 0 to {teacher_depth} (0: embeddings)"
            )
    if objective.needs_hidden_states and not teacher.output_hidden_states:
        raise UserError("objective.layer_pairs needs a teacher loaded with output_hidden_states=True")
