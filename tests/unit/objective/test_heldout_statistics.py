"""Held-out sums of two models."""

from __future__ import annotations

import math

import pytest
import torch

from train.evaluation.scores import (
    SCORES_BESIDE_TEACHER,
    STUDENT_SCORES,
    heldout_statistics,
    heldout_sums,
)
from train.models.families import DecoderInputs
from train.models.students import make_student
from train.models.teacher import Teacher


def named(sums, names=SCORES_BESIDE_TEACHER):
    return dict(zip(("count", *names), sums.tolist(), strict=True))


@pytest.mark.parametrize("num_teachers", [0, 1, 2])
def test_heldout_statistics_equal_full_logits(models, batch, num_teachers):
    teacher, student = models
    frozen = None
    if num_teachers:
        frozen = Teacher(
            [teacher, make_student(teacher, 3).double()][:num_teachers], [1.0, 3.0][:num_teachers]
        )
    sums = heldout_statistics(student, batch, frozen(batch.input_ids) if frozen else None, chunk_tokens=3)
    sums = named(sums, SCORES_BESIDE_TEACHER if frozen else STUDENT_SCORES)
    rows = torch.arange(3)[:, None].expand(3, 4)[batch.valid]
    columns, targets = batch.positions[batch.valid], batch.targets[batch.valid]
    log_student = torch.log_softmax(student(batch.input_ids).logits[rows, columns], -1)
    assert sums["count"] == batch.valid.sum().item()
    assert sums["heldout_mlm_loss"] == pytest.approx(
        torch.nn.functional.nll_loss(log_student, targets, reduction="sum").item(), rel=1e-10
    )
    assert sums["heldout_accuracy"] == (log_student.argmax(-1) == targets).sum().item()
    if frozen is None:
        return
    soft = sum(
        share * torch.softmax(model(batch.input_ids).logits[rows, columns], -1)
        for share, model in zip(frozen.shares, frozen.models, strict=True)
    )
    assert sums["teacher_heldout_mlm_loss"] == pytest.approx(
        torch.nn.functional.nll_loss(soft.log(), targets, reduction="sum").item(), rel=1e-10
    )
    assert sums["teacher_heldout_accuracy"] == (soft.argmax(-1) == targets).sum().item()
    assert sums["heldout_top1_agreement"] == (soft.argmax(-1) == log_student.argmax(-1)).sum().item()
    expected = torch.nn.functional.kl_div(log_student, soft, reduction="sum")
    assert sums["heldout_kl"] == pytest.approx(expected.item(), rel=1e-9)


def test_heldout_sums_leave_dropped_rows_out():
    rows = DecoderInputs(torch.tensor([[1.0], [float("nan")]]), torch.ones(3, 1), None)
    sums = named(heldout_sums(rows, [rows], torch.tensor([0, 0]), torch.tensor([True, False])))
    assert sums["count"] == 1
    assert sums["heldout_mlm_loss"] == pytest.approx(math.log(3))
    assert sums["heldout_kl"] == pytest.approx(0, abs=1e-6)
