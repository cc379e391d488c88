"""The relation term against its formula as written, hand-worked values and torch's own divergence."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from train.objective.reference import reference_relations
from train.objective.relations import relation_loss
from train.objective.token_selection import keep_weights


@st.composite
def problems(draw):
    """Vectors of two models on random shapes, with padding, and a division of the maps into chunks."""
    batch, length, heads = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    widths = [heads * draw(st.integers(1, 5)) for _ in range(2)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 8.0]))
    student, teacher = (
        [
            scale * torch.randn(batch, length, width, generator=generator, dtype=torch.float64)
            for _ in range(3)
        ]
        for width in widths
    )
    mask = draw(st.sampled_from([None, torch.rand(batch, length, generator=generator) < 0.7]))
    chunk_maps = draw(st.sampled_from([None, 1, 2, 7]))
    num_tokens = draw(st.sampled_from([None, 5.0]))
    return SimpleNamespace(
        student=student,
        teacher=teacher,
        heads=heads,
        mask=mask,
        chunk_maps=chunk_maps,
        num_tokens=num_tokens,
    )


def both(problem, dtype=torch.float64):
    """(value, gradients of the three vectors) of the pass in `dtype`, and of the formula in fp64."""
    student = [vectors.to(dtype).requires_grad_() for vectors in problem.student]
    teacher = [vectors.to(dtype) for vectors in problem.teacher]
    ids = torch.zeros(problem.student[0].shape[:2], dtype=torch.long)
    weights = keep_weights(ids, problem.mask, problem.num_tokens).view_as(ids)
    loss = relation_loss(
        student, teacher, weights, problem.mask, heads=problem.heads, chunk_maps=problem.chunk_maps
    )
    loss.backward()
    exact = [vectors.detach().double().requires_grad_() for vectors in student]
    expected = reference_relations(
        exact, [vectors.double() for vectors in teacher], problem.heads, problem.mask, problem.num_tokens
    )
    expected.backward()
    return (loss.detach(), [each.grad for each in student]), (
        expected.detach(),
        [each.grad for each in exact],
    )


@settings(max_examples=120, deadline=None)
@given(problems())
def test_values_and_gradients_are_the_formulas(problem):
    (loss, gradients), (expected, exact) = both(problem)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for own, reference in zip(gradients, exact, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)]
)
@settings(max_examples=30, deadline=None)
@given(problems())
def test_lower_precision_is_rounding_away_from_the_formula(dtype, tolerance, problem):
    """The vectors are rounded to the format beforehand; what is left is fp32 sums and the gradients' rounding."""
    (loss, gradients), (expected, exact) = both(problem, dtype)
    for own, reference in zip([loss, *gradients], [expected, *exact], strict=True):
        limit = tolerance * max(1.0, reference.abs().max().item())
        assert (own.double() - reference).abs().max().item() <= limit


def test_hand_worked_value():
    """Two tokens, one head of size 1: scores are products of numbers, so each row's divergence is a line."""
    student, teacher = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[2.0], [0.0]]])
    p, q = 1 / (1 + math.exp(-4)), 1 / (1 + math.exp(-1))  # first row: scores (4, 0) and (1, 0)
    first = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    weights = torch.full((1, 2), 0.5)  # the second row is (0, 0) of both: no divergence
    loss = relation_loss([student] * 3, [teacher] * 3, weights, heads=1)
    assert loss.item() == pytest.approx(3 * first / 2, rel=1e-6)


def test_it_is_torchs_divergence():
    """nn.functional.kl_div of whole maps: a second formula, and autograd's gradient."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        [torch.randn(2, 6, width, generator=generator, dtype=torch.float64) for _ in range(3)]
        for width in (8, 12)
    )
    leaves = [vectors.clone().requires_grad_() for vectors in student]
    relation_loss(leaves, teacher, torch.full((2, 6), 1 / 12, dtype=torch.float64), heads=4).backward()
    others = [vectors.clone().requires_grad_() for vectors in student]
    for own, theirs in zip(others, teacher, strict=True):
        maps = [
            torch.einsum("blhd,bmhd->bhlm", parts, parts) / math.sqrt(parts.shape[-1])
            for parts in (vectors.unflatten(-1, (4, -1)) for vectors in (own, theirs))
        ]
        own_log, their_log = (torch.log_softmax(each, -1).flatten(0, 2) for each in maps)
        nn.functional.kl_div(own_log, their_log, log_target=True, reduction="batchmean").backward()
    for own, other in zip(leaves, others, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_padding_may_hold_anything():
    vectors = [torch.randn(1, 4, 4) for _ in range(3)]
    mask, weights = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]]) / 3
    teacher = [0.5 * each for each in vectors]
    clean = [each.clone().requires_grad_() for each in vectors]
    expected = relation_loss(clean, teacher, weights, mask, heads=2)
    expected.backward()
    spoiled = [each.clone() for each in vectors]
    for each in (*spoiled, *teacher):
        each[:, 3] = math.nan
    spoiled = [each.requires_grad_() for each in spoiled]
    loss = relation_loss(spoiled, teacher, weights, mask, heads=2)
    loss.backward()
    assert loss.item() == expected.item()
    for own, other in zip(spoiled, clean, strict=True):
        assert torch.equal(own.grad, other.grad)
        assert not own.grad[:, 3].any()


def test_one_backward_pass_and_no_gradient_where_none_is_asked():
    vectors = [torch.randn(1, 3, 4, requires_grad=True) for _ in range(3)]
    weights = torch.full((1, 3), 1 / 3)
    with torch.no_grad():
        assert not relation_loss(vectors, vectors, weights, heads=2).requires_grad
    loss = relation_loss(vectors, [each.detach() for each in vectors], weights, heads=2)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()
