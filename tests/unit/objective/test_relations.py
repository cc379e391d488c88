"""The relation term against its formula as written, hand-worked values and torch's own divergence."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from torch import nn

from tests.relation_deviations import FORMS, deviations, draw, main
from train.objective import relations, relations_native
from train.objective.relations import relation_loss


@pytest.fixture(params=FORMS)
def form(request) -> str:
    if request.param == "C loops" and shutil.which("cc") is None:
        pytest.skip("no C compiler")
    return request.param


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 3e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)],
)
def test_values_and_gradients_are_the_formulas(dtype, tolerance, form):
    """The vectors are rounded to the format beforehand; what is left is sums in fp32 and the gradients' rounding."""
    for seed in range(120 if dtype == torch.float64 else 30):
        found = deviations(draw(seed), dtype, form)
        assert max(found) <= tolerance, (seed, found)


def test_the_table_of_deviations(capsys):
    assert main(["--problems", "2"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows[2::2]] == ["| fp64", "| fp32", "| fp16", "| bf16"]


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


def test_padding_may_hold_anything(form):
    chunk_maps = None if form == "C loops" else 2
    vectors = [torch.randn(1, 4, 4) for _ in range(3)]
    mask, weights = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]]) / 3
    teacher = [0.5 * each for each in vectors]
    clean = [each.clone().requires_grad_() for each in vectors]
    expected = relation_loss(clean, teacher, weights, mask, heads=2, chunk_maps=chunk_maps)
    expected.backward()
    spoiled = [each.clone() for each in vectors]
    for each in (*spoiled, *teacher):
        each[:, 3] = math.nan
    spoiled = [each.requires_grad_() for each in spoiled]
    loss = relation_loss(spoiled, teacher, weights, mask, heads=2, chunk_maps=chunk_maps)
    loss.backward()
    assert loss.item() == expected.item()
    for own, other in zip(spoiled, clean, strict=True):
        assert torch.equal(own.grad, other.grad)
        assert not own.grad[:, 3].any()


def test_one_token_in_any_layout(form):
    """torch calls a transposed (1, B, width) contiguous; the distance to its next position is then any number."""
    weights = torch.ones(5, 1)
    student = torch.randn(1, 5, 8).transpose(0, 1).requires_grad_()
    teacher = [torch.randn(5, 1, 8)] * 3
    loss = relation_loss(
        [student] * 3, teacher, weights, heads=2, chunk_maps=None if form == "C loops" else 2
    )
    assert loss.item() == 0


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


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e25])
def test_what_is_no_number_stays_so(form, value):
    """Of a token that counts, and in the gradients: nothing of a spoilt step may pass for numbers."""
    vectors = [torch.randn(1, 40, 4) for _ in range(3)]
    spoiled = [each.clone() for each in vectors]
    spoiled[1][0, 3, 2] = value
    spoiled = [each.requires_grad_() for each in spoiled]
    weights = torch.full((1, 40), 1 / 40)
    loss = relation_loss(spoiled, vectors, weights, heads=2, chunk_maps=None if form == "C loops" else 1)
    loss.backward()
    assert loss.isnan()
    assert spoiled[1].grad.isnan().any()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_threads_change_no_bit():
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(3, 200, 96, generator=generator) for _ in range(6)]
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        student = [each.clone().requires_grad_() for each in vectors[:3]]
        loss = relation_loss(student, vectors[3:], torch.full((3, 200), 1 / 600), heads=12)
        loss.backward()
        found.append([loss.detach(), *(each.grad for each in student)])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_without_a_compiler_torch_does_it(monkeypatch):
    monkeypatch.setenv("CC", "/nonexistent/cc")
    monkeypatch.setattr(relations, "build", relations_native.build.__wrapped__)
    monkeypatch.setattr(relations, "native_pass", None)
    assert deviations(draw(3), torch.float64, "C loops")[1] < 1e-10
