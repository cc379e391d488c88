"""The one-pass losses over the vocabulary against the formula as it is written, and against numbers by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.unit.objective.given import random_batch, random_decoder, selected
from train.models.families import DecoderInputs
from train.objective import fused_loss, vocabulary_native
from train.objective.chunk_terms import VocabularyWeights
from train.objective.fused_loss import chunk_rows, vocabulary_loss
from train.objective.hidden_loss import hidden_cosine
from train.objective.reference import reference_terms
from train.objective.token_selection import select_tokens


@st.composite
def problems(draw):
    """A random objective on random numbers: what the fused pass and the formula are both given."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    masked = draw(st.integers(1, length))
    vocabulary = draw(st.one_of(st.integers(2, 40), st.sampled_from([511, 512, 1023, 1025])))
    width = draw(st.integers(1, 8))
    num_teachers = draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = st.sampled_from([0.0, 0.3, 1.0, 5.0])
    valid_share = draw(st.sampled_from([0.0, 0.7, 1.0]))
    shares = torch.rand(num_teachers, generator=generator, dtype=torch.float64) + 0.1
    mlm_weight = draw(weight)
    return SimpleNamespace(
        masked=random_batch(batch, length, masked, vocabulary, generator, valid_share),
        attention_mask=draw(
            st.sampled_from(
                [None, torch.rand(batch, length, generator=generator) < 0.7, torch.zeros(batch, length)]
            )
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


def fused(problem, dtype=torch.float64, grad_scale=1.0):
    """Loss terms and the gradients of (features, weight, bias) by the fused pass."""
    has_teacher = problem.kd_weight > 0 or problem.mse_weight > 0
    tokens = select_tokens(
        problem.masked,
        problem.attention_mask,
        all_positions=has_teacher and problem.kd_positions == "all",
        num_tokens=problem.counts[0],
        num_masked_tokens=problem.counts[1],
    )
    leaves = [
        None if tensor is None else tensor.to(dtype, copy=True).requires_grad_()
        for tensor in (problem.student.features, problem.student.weight, problem.student.bias)
    ]
    teachers = [
        DecoderInputs(t.features.to(dtype)[tokens.order], t.weight.to(dtype), t.bias.to(dtype), share)
        for t, share in zip(problem.teachers, problem.shares, strict=True)
    ]
    terms = vocabulary_loss(
        DecoderInputs(leaves[0][tokens.order], leaves[1], leaves[2]),
        teachers if has_teacher else [],
        tokens,
        VocabularyWeights(problem.temperature, problem.kd_weight, problem.mlm_weight, problem.mse_weight),
        chunk_tokens=problem.chunk_tokens,
    )
    (terms.loss * grad_scale).backward()
    return terms, [None if leaf is None else leaf.grad for leaf in leaves]


def plain(problem, dtype=torch.float64):
    """The same by the formula on full logits."""
    shape = (*problem.masked.input_ids.shape, -1)
    leaves = [
        None if tensor is None else tensor.to(dtype, copy=True).double().requires_grad_()
        for tensor in (problem.student.features, problem.student.weight, problem.student.bias)
    ]
    logits = leaves[0] @ leaves[1].T + (0 if leaves[2] is None else leaves[2])
    teacher_logits = [
        (t.features.to(dtype).double() @ t.weight.to(dtype).double().T + t.bias.to(dtype).double()).view(
            shape
        )
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
    assume(
        problem.kd_weight + problem.mse_weight + problem.mlm_weight > 0
    )  # else there is nothing to compare
    expected, loss, expected_gradients = plain(problem, dtype)
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients if gradient is not None)
    # A scaled gradient beyond the format's range becomes infinite, and the engine skips that step.
    assume(largest * grad_scale < torch.finfo(dtype).max)
    terms, gradients = fused(problem, dtype, grad_scale)
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
    if dtype == torch.float64 and problem.kd_weight > 0:
        assert abs(terms.top1_agreement.item() - expected.top1_agreement.item()) < 1e-12


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_fp64_values_and_gradients_equal_the_formula(form, problem):
    assert_equal(problem, torch.float64, 1e-10)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "grad_scale"),
    [(torch.float32, 3e-5, 1.0), (torch.float16, 2e-3, 64.0), (torch.bfloat16, 1.6e-2, 1.0)],
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_lower_precisions_stay_within_tolerance(form, problem, dtype, tolerance, grad_scale):
    """Against fp64 on the rounded inputs: what is left is the rounding of the results."""
    assert_equal(problem, dtype, tolerance, grad_scale)


def test_hand_worked_values(form):
    """Two tokens, two words, T = 2: the teacher says 3:1, the student 1:1, and the answer is word 0."""
    log3 = math.log(3.0)
    student = DecoderInputs(
        torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64), None
    )
    teacher = DecoderInputs(
        torch.ones(2, 1, dtype=torch.float64), torch.tensor([[2 * log3], [0.0]], dtype=torch.float64), None
    )
    features = student.features.clone().requires_grad_()
    bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    terms = vocabulary_loss(
        DecoderInputs(features, student.weight, bias),
        [teacher],
        selected([0.5, 0.5], [0], [1.0]),
        VocabularyWeights(temperature=2.0, kd=1.0, mlm=1.0),
    )
    terms.loss.backward()
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert terms.kd.item() == pytest.approx(4 * kl, abs=1e-12)
    assert terms.mlm.item() == pytest.approx(math.log(2), abs=1e-12)
    assert terms.loss.item() == pytest.approx(4 * kl + math.log(2), abs=1e-12)
    # T (softmax - target) for KD, summed over a mean of two equal tokens; softmax - onehot for MLM.
    assert bias.grad.tolist() == pytest.approx([2 * (0.5 - 0.75) - 0.5, 2 * (0.5 - 0.25) + 0.5], abs=1e-12)
    assert terms.top1_agreement.item() == 1.0  # the student's largest logit is shared with word 0


def test_without_a_compiler_torch_does_it(monkeypatch):
    monkeypatch.setenv("CC", "/nonexistent/cc")
    monkeypatch.setattr(fused_loss, "build", vocabulary_native.build.__wrapped__)
    monkeypatch.setattr(fused_loss, "native_chunk_terms", None)
    monkeypatch.setattr(fused_loss, "fastest_terms", fused_loss.fastest_terms.__wrapped__)
    test_hand_worked_values(None)


def test_no_tensor_of_tokens_by_vocabulary_beyond_one_chunk():
    """Watch every allocation's shape while 64 tokens pass in chunks of 8."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (500,):
                    largest.append(tensor.numel() // 500)
            return result

    generator = torch.Generator().manual_seed(0)
    student, teacher = (random_decoder((64, 500, 4), generator, True) for _ in range(2))
    for tensor in (student.features, student.weight, student.bias):
        tensor.requires_grad_()
    tokens = selected(torch.ones(64), torch.zeros(64), torch.ones(64))
    with Watch():
        vocabulary_loss(
            student, [teacher], tokens, VocabularyWeights(2.0, kd=1.0, mlm=1.0), chunk_tokens=8
        ).loss.backward()
    assert max(largest) == 8


def test_gradients_are_handed_over_once_and_only_where_wanted():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (random_decoder((6, 9, 4), generator, True) for _ in range(2))
    student.features.requires_grad_()
    arguments = ([teacher], selected(torch.ones(6)), VocabularyWeights(1.0, kd=1.0, mlm=0.0))
    terms = vocabulary_loss(student, *arguments)
    terms.loss.backward(retain_graph=True)
    assert student.weight.grad is None
    with pytest.raises(RuntimeError, match="one backward pass"):
        terms.loss.backward()
    with torch.no_grad():
        assert not vocabulary_loss(student, *arguments).loss.requires_grad


def test_padding_may_hold_anything(form):
    """NaN in rows that count in no mean reaches neither values nor gradients."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (random_decoder((6, 9, 4), generator, True) for _ in range(2))
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    found = []
    for filler in (0.0, float("nan"), float("inf")):
        features, taught = student.features.clone(), teacher.features.clone()
        features[[2, 4]], taught[[2, 4]] = filler, filler
        features.requires_grad_()
        weight = student.weight.clone().requires_grad_()
        terms = vocabulary_loss(
            DecoderInputs(features, weight, student.bias),
            [DecoderInputs(taught, teacher.weight, teacher.bias)],
            selected(weights, [3, 5, 1], weights[:3]),
            VocabularyWeights(2.0, kd=1.0, mlm=1.0, mse=1.0),
            chunk_tokens=4,
        )
        loss = terms.loss + hidden_cosine(features, taught, weights)
        loss.backward()
        found.append(torch.cat([loss.detach()[None], features.grad.flatten(), weight.grad.flatten()]))
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_chunks_have_equal_sizes():
    weight = torch.empty(30522, 1)
    assert chunk_rows(1024, weight) == 512
    assert chunk_rows(600, weight) == 300
    assert chunk_rows(152, weight) == 152
    assert chunk_rows(0, weight) == 1
    assert chunk_rows(10, weight, 4) == 4


@pytest.mark.parametrize("denominator", [40, 10**7])
@pytest.mark.parametrize(
    "weights",
    [{}, {"mse": 1.0}, {"mse": 30.0}, {"mse": 3000.0}, {"kd": 0.0, "mlm": 0.0, "mse": 300.0}, {"kd": 1000.0}],
    ids=str,
)
def test_half_precision_products_neither_underflow_nor_overflow(denominator, weights, monkeypatch):
    """A GPU's path on the CPU: operands in fp16, sums in fp32; a global batch's count makes weights tiny."""
    weights = VocabularyWeights(**{"temperature": 2.0, "kd": 5.0, "mlm": 2.0, **weights})
    multiply = torch.mm

    def summed_in_fp32(left, right, out_dtype=None, out=None):
        if out_dtype is None:
            return multiply(left, right, out=out)
        assert torch.isfinite(left).all()
        assert max(left.stride()) * left.element_size() % 16 == 0, "cuBLAS takes slower kernels"
        return multiply(left.to(out_dtype), right.to(out_dtype))

    monkeypatch.setattr(torch, "mm", summed_in_fp32)
    monkeypatch.setattr(DecoderInputs, "in_dtype", lambda self, dtype: self)
    generator = torch.Generator().manual_seed(2)
    tokens = 40
    student, teacher = (random_decoder((tokens, 300, 8), generator, True) for _ in range(2))
    count = tokens // 7

    def run(dtype, scale):
        leaves = [
            t.detach().clone().to(dtype).requires_grad_()
            for t in (student.features, student.weight, student.bias)
        ]
        terms = vocabulary_loss(
            DecoderInputs(*leaves),
            [DecoderInputs(*(t.to(dtype) for t in (teacher.features, teacher.weight, teacher.bias)))],
            selected(
                torch.full((tokens,), 1 / denominator, dtype=torch.float64),
                torch.arange(count) % 300,
                torch.full((count,), 1 / denominator, dtype=torch.float64),
            ),
            weights,
            chunk_tokens=15,
        )
        (terms.loss * scale).backward()
        return terms.loss.item(), [leaf.grad.double() / scale for leaf in leaves]

    expected, wanted = run(torch.float64, 1.0)
    # A loss scale as the engine would have come to: what is left to overflow does so in the products' operands.
    largest = max(float(gradient.abs().max()) for gradient in wanted)
    loss, found = run(torch.float16, min(2.0**6 * denominator, 2.0 ** math.floor(math.log2(2**14 / largest))))
    assert loss == pytest.approx(expected, rel=2e-3)
    for own, other in zip(found, wanted, strict=True):
        assert (own - other).norm() < 5e-3 * other.norm()


def test_bf16_on_a_cpu_rounds_what_is_multiplied_and_nothing_else():
    """Logits and sums are fp32; the gradient at the targets, one value for all, is not rounded to one side.

    On a processor without bf16 products the fp32 ones are at hand, and closer.
    """
    generator = torch.Generator().manual_seed(5)
    tokens, vocabulary, width, masked = 512, 1000, 64, 73
    student, teacher = (random_decoder((tokens, vocabulary, width), generator, True) for _ in range(2))
    targets = torch.randint(vocabulary, (masked,), generator=generator)

    def run(dtype):
        leaves = [t.bfloat16().to(dtype).requires_grad_() for t in (student.features, student.weight)]
        terms = vocabulary_loss(
            DecoderInputs(*leaves, student.bias.bfloat16().to(dtype)),
            [DecoderInputs(*(t.bfloat16().to(dtype) for t in (teacher.features, teacher.weight)), None)],
            selected(torch.full((tokens,), 1 / tokens), targets, torch.full((masked,), 1 / masked)),
            VocabularyWeights(temperature=2.0, kd=5.0, mlm=2.0),
            chunk_tokens=100,
        )
        terms.loss.backward()
        return terms, [leaf.grad.double() for leaf in leaves]

    before = torch.backends.mkldnn.matmul.fp32_precision
    (expected, wanted), (terms, found) = run(torch.float64), run(torch.bfloat16)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    for name in ("loss", "kd", "mlm", "top1_agreement"):
        # Logits of up to 50, in fp32: each is 2^-24 * 50 * sqrt(width) off at most.
        assert getattr(terms, name).item() == pytest.approx(getattr(expected, name).item(), rel=3e-5)
    for own, other in zip(found, wanted, strict=True):
        assert (own - other).norm() < 2**-8 * other.norm()
        assert (own * other).sum() / (other * other).sum() == pytest.approx(1, abs=2**-12)
