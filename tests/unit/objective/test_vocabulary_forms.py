"""One chunk's losses over the vocabulary in all forms that compute them: C loops, torch operations, a GPU's kernel."""

from __future__ import annotations

import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.unit.objective.given import random_decoder, selected
from train.models.families import DecoderInputs
from train.objective import fused_loss, vocabulary_native
from train.objective.chunk_terms import Chunk, VocabularyWeights, Workspace, chunk_terms
from train.objective.fused_loss import vocabulary_loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stays_so(form, value):
    """Of a token that counts: nothing of a spoilt step may pass for numbers."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (random_decoder((6, 90, 4), generator, True) for _ in range(2))
    student.features[2, 1] = value
    leaves = [tensor.requires_grad_() for tensor in (student.features, student.weight, student.bias)]
    terms = vocabulary_loss(
        DecoderInputs(*leaves),
        [teacher],
        selected(torch.ones(6), [3], [1.0]),
        VocabularyWeights(2.0, 1.0, 1.0),
    )
    terms.loss.backward()
    assert terms.loss.isnan()
    assert all(leaf.grad.isnan().any() for leaf in leaves)


@pytest.mark.parametrize("temperature", [2.0, 0.001])
@pytest.mark.parametrize("offsets", [(3000.0, 0.0), (0.0, 3000.0)])
def test_a_constant_added_to_all_logits_changes_nothing(form, offsets, temperature):
    """Of either model, with a last vector of logits that is not full."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randint(-8, 8, (2, 3, 21), generator=generator).double() / 4
    tokens = selected(torch.ones(3, dtype=torch.float64), [3, 20], torch.ones(2, dtype=torch.float64))
    one_hot = torch.eye(3, dtype=torch.float64)
    found = []
    for own, theirs in (offsets, (0.0, 0.0)):
        bias = torch.full((21,), own, dtype=torch.float64, requires_grad=True)
        terms = vocabulary_loss(
            DecoderInputs(one_hot, student.T, bias),
            [DecoderInputs(one_hot, teacher.T, torch.full((21,), theirs, dtype=torch.float64))],
            tokens,
            VocabularyWeights(temperature, kd=1.0, mlm=1.0),
        )
        terms.loss.backward()
        found.append(torch.cat([terms.loss.detach()[None], bias.grad]))
    assert (found[0] - found[1]).abs().max() < 1e-9


def test_the_first_of_equal_logits_is_preferred(form):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randint(3, (50, 37), generator=generator).float() for _ in range(2))
    best = (teacher == teacher.amax(1, keepdim=True)).int().argmax(1, keepdim=True)
    agree = student.gather(1, best).squeeze(1) == student.amax(1)
    terms = vocabulary_loss(
        DecoderInputs(torch.eye(50), student.T, None),
        [DecoderInputs(torch.eye(50), teacher.T, None)],
        selected(torch.ones(50)),
        VocabularyWeights(2.0, kd=1.0, mlm=0.0),
    )
    assert 0 < agree.sum() < 50
    assert terms.top1_agreement.item() == pytest.approx(agree.float().mean().item())


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, -1], ids=hex)
@pytest.mark.parametrize("where", [5, 89])
@pytest.mark.parametrize("taught", [True, False])
def test_one_logit_that_is_no_number_spoils_its_row(form, where, bits, taught):
    """Whatever its last bits are."""
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (random_decoder((2, 90, 4), generator, True) for _ in range(2))
    features, weight, bias = student.features.float(), student.weight.float(), student.bias.float()
    bias[where : where + 1] = nan
    teachers = [DecoderInputs(*(t.float() for t in (teacher.features, teacher.weight, teacher.bias)))]
    terms = vocabulary_loss(
        DecoderInputs(features.requires_grad_(), weight, bias),
        teachers if taught else [],
        selected(torch.ones(2), [3, 4], [1.0, 1.0]),
        VocabularyWeights(2.0, kd=float(taught), mlm=1.0),
    )
    terms.loss.backward()
    assert terms.loss.isnan()
    assert features.grad.isnan().all()


@pytest.mark.parametrize("lowest", [-1e4, -1e30, torch.finfo(torch.float32).min])
def test_tokens_that_the_teacher_excludes(form, lowest):
    """By a bias: each costs the student what it gives them, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 40, generator=generator) for _ in range(2))
    excluded = torch.arange(40) % 5 == 0
    target = torch.where(excluded, -torch.inf, teacher / 2).softmax(-1)
    kd = 4 * (target * (target.log() - (student / 2).log_softmax(-1))).nan_to_num().sum()
    bias = torch.zeros(40, requires_grad=True)
    terms = vocabulary_loss(
        DecoderInputs(torch.eye(2), student.T, bias),
        [DecoderInputs(torch.eye(2), teacher.T, torch.where(excluded, lowest, 0.0))],
        selected(torch.ones(2)),
        VocabularyWeights(2.0, kd=1.0, mlm=0.0),
    )
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(kd.item(), rel=1e-6)
    assert torch.allclose(bias.grad, 2 * ((student / 2).softmax(-1) - target).sum(0), atol=1e-6)


def test_exponentials(form):
    """Each entry of the gradient of MLM is one: nearly fp32's own precision, from 1 to its smallest normal numbers."""
    logits = torch.linspace(-100.0, 0.0, 20_000)[None]
    bias = torch.zeros(20_000, requires_grad=True)
    tokens = selected([1.0], [19_999], [1.0])
    vocabulary_loss(
        DecoderInputs(torch.ones(1, 1), logits.T, bias), [], tokens, VocabularyWeights(1.0, kd=0.0, mlm=1.0)
    ).loss.backward()
    expected = logits[0].double().softmax(-1)
    normal = slice(int((logits[0] < -80).sum()), -1)
    deviations = (bias.grad.double() - expected).abs() / expected
    assert deviations[normal].max() < 3e-7
    assert (bias.grad[logits[0] < -89] < 1e-38).all()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_threads_change_no_bit():
    """Of the loops; features of one 1 each, so that products are exact."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        DecoderInputs(torch.eye(50), torch.randn(3000, 50, generator=generator), None) for _ in range(2)
    )
    tokens = selected(torch.full((50,), 1 / 50), torch.arange(9), torch.full((9,), 1 / 9))
    weights = VocabularyWeights(2.0, kd=5.0, mlm=2.0, mse=0.1)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        values = torch.zeros(4)
        chunk = Chunk(student, (teacher,), tokens, weights, Workspace(), torch.float32, torch.float32)
        library = vocabulary_native.build(torch.float32)
        found.append([vocabulary_native.native_chunk_terms(library, chunk, values), values])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "import of train.objective.vocabulary_triton halted"),
        (
            SimpleNamespace(deviation=lambda device: 0.5, triton_chunk_terms=None),
            "its results differ .* by 5.0e-01",
        ),
        (
            SimpleNamespace(deviation=lambda device: math.nan, triton_chunk_terms=None),
            "its results differ .* by nan",
        ),
    ],
)
def test_a_gpu_whose_kernel_fails_or_differs_keeps_torch(module, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "train.objective.vocabulary_triton", module)
    choose = fused_loss.fastest_terms.__wrapped__
    with pytest.warns(UserWarning, match=reason):
        assert choose(torch.device("cuda"), torch.float32) is chunk_terms


def test_a_gpu_whose_kernel_agrees_takes_it(monkeypatch):
    module = SimpleNamespace(deviation=lambda device: 1e-6, triton_chunk_terms=object())
    monkeypatch.setitem(sys.modules, "train.objective.vocabulary_triton", module)
    choose = fused_loss.fastest_terms.__wrapped__
    assert choose(torch.device("cuda"), torch.float32) is module.triton_chunk_terms
    assert choose(torch.device("cuda"), torch.float64) is chunk_terms
