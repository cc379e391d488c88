"""How well a student predicts held-out tokens, and how close it is to its teacher, without full logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from train.data.masking import MaskedBatch
from train.models.families import DecoderInputs, family_of
from train.models.teacher import TeacherOutput
from train.objective.chunk_terms import Workspace, tempered_logits
from train.objective.fused_loss import chunk_rows
from train.objective.token_selection import select_tokens

STUDENT_SCORES = ("heldout_mlm_loss", "heldout_accuracy")
"""Means over masked positions: cross entropy with the original token (nats), share where that is the first choice."""
SCORES_BESIDE_TEACHER = (
    *STUDENT_SCORES,
    "heldout_kl",
    "heldout_top1_agreement",
    "teacher_heldout_mlm_loss",
    "teacher_heldout_accuracy",
)
"""KL(teacher || student) at T = 1 (nats), share where both have the same first choice; the teacher's own scores."""


@torch.no_grad()
def heldout_statistics(
    student: PreTrainedModel,
    masked: MaskedBatch,
    teacher: TeacherOutput | None = None,
    *,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Score a student, and its teacher if given, at the masked positions.

    Args:
        student: in eval mode; of the teacher's vocabulary.
        masked: input_ids (B, L) int64; positions, targets (B, n) int64; valid (B, n) bool.
        teacher: its output on masked.input_ids; several are one ensemble.
    Returns:
        fp64 on the device: the number of valid masked positions, then the sums over them of STUDENT_SCORES, or with a
        teacher of SCORES_BESIDE_TEACHER. Add batches and ranks, then divide.
    """
    family = family_of(student)
    tokens = select_tokens(masked, None, all_positions=False)
    hidden = family.encode(student, masked.input_ids).last_hidden.flatten(0, 1)
    inputs = family.decoder_inputs(student, hidden[tokens.order])
    teachers = teacher.decoder_inputs(tokens.order) if teacher is not None else ()
    return heldout_sums(inputs, teachers, tokens.targets, masked.valid.flatten(), chunk_tokens)


@torch.no_grad()
def heldout_sums(
    student: DecoderInputs,
    teachers: Sequence[DecoderInputs],
    targets: torch.Tensor,
    keep: torch.Tensor,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """The same from decoder inputs.

    Args:
        student: N rows. teachers: their N rows each.
        targets: (N,) int64 original tokens. keep: (N,) bool.
    """
    names = SCORES_BESIDE_TEACHER if teachers else STUDENT_SCORES
    sums = torch.zeros(len(names), dtype=torch.float64, device=targets.device)
    workspace = Workspace()
    size = chunk_rows(targets.shape[0], student.weight, chunk_tokens)
    for start in range(0, targets.shape[0], size):
        rows = slice(start, start + size)
        log_student = _log_probabilities([student], rows, workspace, "student")
        columns = _scores(log_student, targets[rows])
        if teachers:
            log_teacher = _log_probabilities(teachers, rows, workspace, "teacher")
            agreement = log_teacher.argmax(-1) == log_student.argmax(-1)
            of_teacher = _scores(log_teacher, targets[rows])
            divergence = (log_teacher - log_student).mul_(log_teacher.exp_()).sum(-1)
            columns += [divergence, agreement, *of_teacher]
        # torch.where, not a product: a row that is dropped may hold an infinity.
        sums += torch.stack([torch.where(keep[rows], column.double(), 0.0).sum() for column in columns])
    return torch.cat([keep.sum(dtype=torch.float64)[None], sums])


def _log_probabilities(
    models: Sequence[DecoderInputs], rows: slice, workspace: Workspace, name: str
) -> torch.Tensor:
    """(rows, V) log of the share-weighted mean of the models' probabilities."""
    dtype = torch.promote_types(models[0].features.dtype, torch.float32)
    total = None
    for model in models:
        part = model.of(rows).in_dtype(dtype)
        buffer = workspace.get(name, part.features.shape[0], part.weight, dtype)
        log_part = torch.log_softmax(tempered_logits(part, 1.0, buffer), -1)
        if len(models) == 1:
            return log_part
        log_part += math.log(model.share)
        total = log_part if total is None else torch.logaddexp(total, log_part)
    assert total is not None
    return total


def _scores(log_probabilities: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """Cross entropy and correctness, (rows,) each."""
    loss = -log_probabilities.gather(1, targets[:, None]).squeeze(1)
    return [loss, log_probabilities.argmax(-1) == targets]
