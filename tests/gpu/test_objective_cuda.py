"""The objective on a GPU: half precision with loss scaling, memory, agreement with fp32, no waiting."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from train.config_sections.objective import ObjectiveConfig
from train.data.masking import MaskedBatch
from train.evaluation.scores import SCORES_BESIDE_TEACHER, heldout_statistics
from train.evaluation.teacher_precision import check_teacher_precision
from train.models.students import make_student
from train.models.teacher import Teacher
from train.objective.distillation import DistillationLoss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCABULARY = 8000


def make_batch(batch: int, length: int) -> MaskedBatch:
    generator = torch.Generator().manual_seed(0)
    count = round(0.15 * length)
    positions = torch.rand(batch, length, generator=generator).argsort(-1)[:, :count].sort(-1).values
    draw = lambda *shape: torch.randint(VOCABULARY, shape, generator=generator)  # noqa: E731
    valid = torch.ones(batch, count, dtype=torch.bool)
    return MaskedBatch(*(t.cuda() for t in (draw(batch, length), positions, draw(batch, count), valid)))


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        initializer_range=0.05,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    teacher = BertForMaskedLM(config)
    student = make_student(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return teacher.cuda(), student.cuda()


def gradients(student, teacher, objective, masked, scale=1.0):
    terms = objective(student, masked, teacher(masked.input_ids))
    (terms["loss"].float() * scale).backward()
    return terms, {
        name: p.grad.float() / scale for name, p in student.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kd_positions", ["all", "masked"])
def test_half_precision_with_loss_scaling_agrees_with_fp32(models, dtype, kd_positions):
    teacher, student = (copy.deepcopy(model) for model in models)
    masked = make_batch(8, 64)
    objective = DistillationLoss(ObjectiveConfig(kd_positions=kd_positions), chunk_tokens=100)
    expected, expected_gradients = gradients(student, Teacher([teacher]), objective, masked)
    half_student, half_teacher = (
        copy.deepcopy(models[1]).to(dtype),
        Teacher([copy.deepcopy(models[0]).to(dtype)]),
    )
    scale = 2.0**12 if dtype == torch.float16 else 1.0
    terms, found = gradients(half_student, half_teacher, objective, masked, scale)
    assert terms["loss"].item() == pytest.approx(expected["loss"].item(), rel=2e-2)
    for name, gradient in expected_gradients.items():
        if gradient.norm() > 1e-4:
            assert (found[name] - gradient).norm() < 0.1 * gradient.norm(), name


def test_memory_stays_within_a_few_buffers(models):
    """64 x 128 tokens: full fp32 logits would be 250 MiB each."""
    teacher, student = models
    masked = make_batch(64, 128)
    objective = DistillationLoss(ObjectiveConfig(), chunk_tokens=256)
    frozen = Teacher([teacher])
    taught = frozen(masked.input_ids)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        objective(student, masked, taught)
    assert torch.cuda.max_memory_allocated() - before < 200 * 2**20


def test_nothing_waits_for_the_device(models):
    teacher, student = models
    masked = make_batch(8, 64)
    frozen, objective = Teacher([teacher]), DistillationLoss(ObjectiveConfig())
    objective(student, masked, frozen(masked.input_ids))["loss"].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective(student, masked, frozen(masked.input_ids))["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_precision_check_and_heldout_statistics(models):
    teacher, student = models
    masked = make_batch(8, 64)
    half = Teacher([copy.deepcopy(teacher).half()])
    (report,) = check_teacher_precision(half, [teacher], masked.input_ids)
    assert report.kl < 1e-3
    sums = heldout_statistics(copy.deepcopy(student).half(), masked, half(masked.input_ids))
    exact = heldout_statistics(student, masked, Teacher([teacher])(masked.input_ids))
    kl = 1 + SCORES_BESIDE_TEACHER.index("heldout_kl")
    assert sums[kl].item() == pytest.approx(exact[kl].item(), rel=0.05)
