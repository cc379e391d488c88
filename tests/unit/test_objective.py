"""The fused objective against the plain formula, hand-worked values and the original code's formula."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.chunk_terms import DecoderRows
from train.fused_loss import chunk_rows, vocabulary_loss
from train.heldout import heldout_sums
from train.hidden_loss import hidden_cosine
from train.masking import MaskedBatch
from train.objective import DistillationLoss, heldout_statistics
from train.objective_reference import original_distiller_loss, reference_cosine, reference_terms
from train.rows import select_rows
from train.students import make_student
from train.teacher import Teacher


def random_batch(batch, length, masked, vocabulary, generator, valid_share=0.8):
    """Masked positions without repetition in a window, some of them invalid."""
    order = torch.rand(batch, length, generator=generator).argsort(-1)[:, :masked].sort(-1).values
    return MaskedBatch(
        input_ids=torch.randint(vocabulary, (batch, length), generator=generator),
        positions=order,
        targets=torch.randint(vocabulary, (batch, masked), generator=generator),
        valid=torch.rand(batch, masked, generator=generator) < valid_share,
    )


@st.composite
def problems(draw):
    """A random objective on random numbers: what the fused pass and the formula are both given."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    masked = draw(st.integers(1, length))
    vocabulary, width = draw(st.integers(2, 40)), draw(st.integers(1, 8))
    num_teachers = draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = st.sampled_from([0.0, 0.3, 1.0, 5.0])
    valid_share = draw(st.sampled_from([0.0, 0.7, 1.0]))
    shares = torch.rand(num_teachers, generator=generator, dtype=torch.float64) + 0.1
    mlm_weight = draw(weight)
    return SimpleNamespace(
        masked=random_batch(batch, length, masked, vocabulary, generator, valid_share),
        attention_mask=draw(
            st.sampled_from([None, torch.rand(batch, length, generator=generator) < 0.7, torch.zeros(batch, length)])
        ),
        student=random_decoder((batch * length, vocabulary, width), generator, draw(st.booleans())),
        teachers=[
            random_decoder((batch * length, vocabulary, draw(st.integers(1, 8))), generator, True)
            for _ in range(num_teachers)
        ],
        shares=(shares / shares.sum()).tolist() if num_teachers else [],
        temperature=draw(st.sampled_from([0.5, 1.0, 2.0, 3.7])),
        kd_weight=draw(weight) if num_teachers else 0.0,
        mse_weight=draw(weight) if num_teachers else 0.0,
        mlm_weight=mlm_weight,
        kd_positions=draw(st.sampled_from(["all", "masked"])),
        counts=draw(st.sampled_from([(None, None), (7.0, 3.0)])),
        chunk_tokens=draw(st.sampled_from([None, 1, 2, 3, 5, 100])),
    )


def random_decoder(shape, generator, has_bias):
    tokens, vocabulary, width = shape
    scale = 3.0 / math.sqrt(width)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    return DecoderRows(scale * draw(tokens, width), draw(vocabulary, width), draw(vocabulary) if has_bias else None)


def fused(problem, dtype=torch.float64, grad_scale=1.0):
    """Loss terms and the gradients of (features, weight, bias) by the fused pass."""
    has_teacher = problem.kd_weight > 0 or problem.mse_weight > 0
    rows = select_rows(
        problem.masked,
        problem.attention_mask,
        all_positions=has_teacher and problem.kd_positions == "all",
        num_tokens=problem.counts[0],
        num_masked_tokens=problem.counts[1],
    )
    leaves = [
        None if tensor is None else tensor.to(dtype).requires_grad_()
        for tensor in (problem.student.features, problem.student.weight, problem.student.bias)
    ]
    teachers = [
        DecoderRows(t.features.to(dtype)[rows.order], t.weight.to(dtype), t.bias.to(dtype), share)
        for t, share in zip(problem.teachers, problem.shares, strict=True)
    ]
    terms = vocabulary_loss(
        leaves[0][rows.order],
        leaves[1],
        leaves[2],
        rows.targets,
        rows.target_weights,
        teachers if has_teacher else [],
        rows.row_weights,
        temperature=problem.temperature,
        kd_weight=problem.kd_weight,
        mlm_weight=problem.mlm_weight,
        mse_weight=problem.mse_weight,
        chunk_tokens=problem.chunk_tokens,
    )
    (terms.loss * grad_scale).backward()
    return terms, [None if leaf is None else leaf.grad for leaf in leaves]


def plain(problem, dtype=torch.float64):
    """The same by the formula on full logits."""
    shape = (*problem.masked.input_ids.shape, -1)
    leaves = [
        None if tensor is None else tensor.to(dtype).double().requires_grad_()
        for tensor in (problem.student.features, problem.student.weight, problem.student.bias)
    ]
    logits = leaves[0] @ leaves[1].T + (0 if leaves[2] is None else leaves[2])
    teacher_logits = [
        (t.features.to(dtype).double() @ t.weight.to(dtype).double().T + t.bias.to(dtype).double()).view(shape)
        for t in problem.teachers
    ]
    terms = reference_terms(
        logits.view(shape),
        teacher_logits,
        problem.shares,
        problem.masked,
        problem.attention_mask,
        temperature=problem.temperature,
        kd_positions=problem.kd_positions,
        num_tokens=problem.counts[0],
        num_masked_tokens=problem.counts[1],
    )
    loss = problem.kd_weight * terms.kd + problem.mlm_weight * terms.mlm + problem.mse_weight * terms.mse
    loss.backward()
    return terms, loss, [None if leaf is None else leaf.grad for leaf in leaves]


def assert_equal(problem, dtype, tolerance, grad_scale=1.0):
    """Within `tolerance` of the largest entry of each result."""
    terms, gradients = fused(problem, dtype, grad_scale)
    expected, loss, expected_gradients = plain(problem, dtype)
    pairs = [(terms.loss, loss)]
    if problem.kd_weight > 0:
        pairs += [(terms.kd, expected.kd)]
    if problem.mse_weight > 0:
        pairs += [(terms.mse, expected.mse)]
    if problem.mlm_weight > 0:
        pairs += [(terms.mlm, expected.mlm)]
    pairs += [
        (own / grad_scale, other)
        for own, other in zip(gradients, expected_gradients, strict=True)
        if own is not None
    ]
    for own, other in pairs:
        assert own.shape == other.shape
        limit = tolerance * max(1.0, other.detach().abs().max().item())
        assert (own.detach().double() - other.detach()).abs().max().item() <= limit
    if dtype == torch.float64 and (problem.kd_weight > 0 or problem.mse_weight > 0):
        assert abs(terms.top1_agreement.item() - expected.top1_agreement.item()) < 1e-12


def drawn_away(problem):
    """Problems in which no term at all is on have nothing to compare."""
    return problem.kd_weight == problem.mse_weight == problem.mlm_weight == 0


@settings(max_examples=300, deadline=None)
@given(problems())
def test_fp64_values_and_gradients_equal_the_formula(problem):
    if not drawn_away(problem):
        assert_equal(problem, torch.float64, 1e-10)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "grad_scale"),
    [(torch.float32, 3e-5, 1.0), (torch.float16, 2e-3, 64.0), (torch.bfloat16, 1.6e-2, 1.0)],
)
@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_lower_precisions_stay_within_tolerance(problem, dtype, tolerance, grad_scale):
    """Against fp64 on the rounded inputs: what is left is the rounding of the results."""
    if not drawn_away(problem):
        assert_equal(problem, dtype, tolerance, grad_scale)
