"""Is a teacher in half precision still the teacher?"""

from __future__ import annotations

import pytest
import torch

from train.errors import UserError
from train.evaluation.teacher_precision import check_teacher_precision
from train.models.loading import load_masked_lm
from train.models.teacher import Teacher, running_copy


@pytest.fixture(scope="module")
def batch():
    return torch.randint(5, 60, (2, 16), generator=torch.Generator().manual_seed(0))


def checked(original, batch, dtype=torch.float32, name="x"):
    """The report of a model that runs in `dtype`."""
    teacher = Teacher([running_copy(original, "cpu", dtype)], names=[name])
    (report,) = check_teacher_precision(teacher, [original], batch)
    return report


def test_half_precision_is_checked_against_fp32(teacher_folder, batch):
    original = load_masked_lm(teacher_folder)
    for dtype, limit in ((torch.float16, 1e-5), (torch.bfloat16, 1e-3)):
        report = checked(original, batch, dtype)
        assert report.dtype == str(dtype).removeprefix("torch.")
        assert 0 < report.kl < limit
        assert report.top1_agreement > 0.9
    report = checked(original, batch)
    assert (report.kl, report.top1_agreement) == (0, 1)


def test_without_a_head_the_hidden_states_are_compared(teacher_folder, batch):
    original = load_masked_lm(teacher_folder).base_model
    for dtype, limit in ((torch.float16, 1e-5), (torch.bfloat16, 1e-3)):
        report = checked(original, batch, dtype)
        assert 0 < report.cosine < limit
        assert str(report).startswith(
            f"no MLM head; {str(dtype).removeprefix('torch.')} against fp32: 1 - cos "
        )
    assert checked(original, batch).cosine < 1e-12
    teacher = Teacher([running_copy(original, "cpu", torch.float16)], names=["x"])
    norm = teacher.models[0].encoder.layer[3].output.LayerNorm
    norm.bias.data.add_(torch.randn(32).half())
    with pytest.raises(
        UserError, match=r"teacher x in float16 is not the model it is .* differ by 0\.\d+ \(1 - cos\)"
    ):
        check_teacher_precision(teacher, [original], batch)
    norm.bias.data[3] = float("nan")
    with pytest.raises(UserError, match="teacher x gives infinite or NaN hidden states in float16: set"):
        check_teacher_precision(teacher, [original], batch)


def test_overflow_and_nan_are_refused(teacher_folder, batch):
    model = load_masked_lm(teacher_folder)
    with torch.no_grad():  # fp16 ends at 65,504
        model.bert.encoder.layer[2].intermediate.dense.weight.mul_(3e6)
        model.bert.encoder.layer[2].output.dense.weight.mul_(1e-6)
    checked(model, batch)
    checked(model, batch, torch.bfloat16)
    with pytest.raises(
        UserError, match=r"infinite or NaN logits in float16: set model.teacher_dtype to bf16 or fp32"
    ):
        checked(model, batch, torch.float16)
    model.cls.predictions.bias.data[3] = float("nan")
    with pytest.raises(UserError, match=r"teacher x gives infinite or NaN logits in float32: check it"):
        checked(model, batch)


def test_a_teacher_that_half_precision_changes_is_refused(teacher_folder, batch):
    original = load_masked_lm(teacher_folder)
    teacher = Teacher([running_copy(original, "cpu", torch.float16)])
    with torch.no_grad():
        teacher.models[0].cls.predictions.bias.add_(torch.randn(teacher.vocab_size).half())
    with pytest.raises(UserError, match=r"is not the model it is in float32: KL 0\.\d+ nats per token"):
        check_teacher_precision(teacher, [original], batch)
