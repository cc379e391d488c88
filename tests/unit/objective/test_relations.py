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
        [scale * torch.randn(batch, length, width, generator=generator, dtype=torch.float64) for _ in range(3)]
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
