"""The fused objective against the plain formula, hand-worked values and the original code's formula."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from train.config_sections.objective import ObjectiveConfig
from train.data.masking import MaskedBatch
from train.errors import UserError
from train.evaluation.scores import heldout_statistics, heldout_sums
from train.loop.trainer import DistillationModule
from train.models.families import DecoderInputs
from train.models.students import make_student
from train.models.teacher import Teacher
from train.objective.build import build_objective
from train.objective.chunk_terms import VocabularyWeights
from train.objective.distillation import DistillationLoss
from train.objective.fused_loss import chunk_rows, vocabulary_loss
from train.objective.hidden_loss import hidden_cosine
from train.objective.reference import original_distiller_loss, reference_cosine, reference_terms
from train.objective.token_selection import SelectedTokens, select_tokens


def random_batch(batch, length, masked, vocabulary, generator, valid_share=0.8):
    """Masked positions; those that are not valid repeat one that may be."""
    order = torch.rand(batch, length, generator=generator).argsort(-1)[:, :masked].sort(-1).values
    valid = torch.rand(batch, masked, generator=generator) < valid_share
    return MaskedBatch(
        input_ids=torch.randint(vocabulary, (batch, length), generator=generator),
        positions=torch.where(valid, order, order[:, :1]),
        targets=torch.randint(vocabulary, (batch, masked), generator=generator),
        valid=valid,
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


def random_decoder(shape, generator, has_bias):
    tokens, vocabulary, width = shape
    scale = 3.0 / math.sqrt(width)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    return DecoderInputs(
        scale * draw(tokens, width), draw(vocabulary, width), draw(vocabulary) if has_bias else None
    )


def selected(row_weights, targets=(), target_weights=()):
    """Tokens in their own order."""
    return SelectedTokens(
        torch.arange(len(row_weights)),
        torch.as_tensor(row_weights),
        torch.as_tensor(targets, dtype=torch.int64),
        torch.as_tensor(target_weights),
    )


def objective_of(chunk_tokens=None, **settings):
    return DistillationLoss(ObjectiveConfig(**settings), chunk_tokens=chunk_tokens)


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
        None if tensor is None else tensor.to(dtype).requires_grad_()
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
        None if tensor is None else tensor.to(dtype).double().requires_grad_()
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


@settings(max_examples=300, deadline=None)
@given(problems())
def test_fp64_values_and_gradients_equal_the_formula(problem):
    assert_equal(problem, torch.float64, 1e-10)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "grad_scale"),
    [(torch.float32, 3e-5, 1.0), (torch.float16, 2e-3, 64.0), (torch.bfloat16, 1.6e-2, 1.0)],
)
@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_lower_precisions_stay_within_tolerance(problem, dtype, tolerance, grad_scale):
    """Against fp64 on the rounded inputs: what is left is the rounding of the results."""
    assert_equal(problem, dtype, tolerance, grad_scale)


def test_hand_worked_values():
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


@pytest.fixture(scope="module")
def models():
    """A tiny BERT teacher with rough weights, and a student of half its depth, both fp64 and in eval mode."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        initializer_range=0.3,
    )
    teacher = BertForMaskedLM(config)
    student = make_student(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return teacher.double().eval(), student.double().eval()


@pytest.fixture
def batch():
    return random_batch(3, 12, 4, 50, torch.Generator().manual_seed(5))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("masked_only", [False, True])
def test_whole_objective_equals_the_original_codes(models, batch, masked_only):
    teacher, student = models
    settings = ObjectiveConfig(mse_weight=0.7, kd_positions="masked" if masked_only else "all")
    mask = torch.ones(3, 12)
    mask[1, 9:] = 0
    batch = dataclasses.replace(batch, valid=batch.valid & (mask.gather(1, batch.positions) > 0))
    labels = torch.full_like(batch.input_ids, -100)
    labels[torch.arange(3)[:, None].expand(3, 4)[batch.valid], batch.positions[batch.valid]] = batch.targets[
        batch.valid
    ]
    outputs = [model(batch.input_ids, mask, output_hidden_states=True) for model in (student, teacher)]
    expected = original_distiller_loss(
        outputs[0].logits,
        outputs[1].logits.detach(),
        outputs[0].hidden_states[-1],
        outputs[1].hidden_states[-1].detach(),
        mask.bool(),
        labels,
        settings,
    )
    student.zero_grad()
    expected.backward()
    expected_gradients = gradients(student)
    objective = DistillationLoss(settings, chunk_tokens=5)
    student.zero_grad()
    terms = objective(student, batch, Teacher([teacher])(batch.input_ids, mask), attention_mask=mask)
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    own = gradients(student)
    assert own.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (own[name] - gradient).abs().max() <= 1e-10 * max(1.0, gradient.abs().max())
    named = terms.as_dict()
    assert list(named) == ["loss", "loss_kd", "loss_mlm", "loss_cos", "loss_mse", "top1_agreement"]
    total = 5 * named["loss_kd"] + 2 * named["loss_mlm"] + named["loss_cos"] + 0.7 * named["loss_mse"]
    assert named["loss"].item() == pytest.approx(total.item(), rel=1e-12)


def test_the_cosine_on_mapped_layers_and_its_projection(models, batch):
    teacher, student = models
    frozen = Teacher([teacher], output_hidden_states=True)
    pairs = [(0, 0), (1, 2), (2, 4)]
    settings = ObjectiveConfig(
        kd_weight=0, mlm_weight=0, cosine_weight=0, layer_cosine_weight=1.5, layer_pairs=pairs
    )
    objective = build_objective(settings, student, frozen)
    student.zero_grad()
    terms = objective(student, batch, frozen(batch.input_ids))
    terms.loss.backward()
    own = gradients(student)
    student.zero_grad()
    hidden = [model(batch.input_ids, output_hidden_states=True).hidden_states for model in (student, teacher)]
    cosines = [reference_cosine(hidden[0][i], hidden[1][j].detach()) for i, j in pairs]
    (1.5 * sum(cosines) / 3).backward()
    assert terms.layer_cosine.item() == pytest.approx(sum(cosines).item() / 3, rel=1e-9)
    for name, gradient in gradients(student).items():
        assert (own[name] - gradient).abs().max() <= 1e-9 * max(1.0, gradient.abs().max())


def test_a_projection_is_trained_where_widths_differ(models, batch):
    teacher, _ = models
    student = make_student(teacher, 2, "random", width=8).double().eval()
    frozen = Teacher([teacher])
    with pytest.raises(UserError, match=r"8 wide.*teacher 0 16.*objective.projection=true"):
        build_objective(ObjectiveConfig(), student, frozen)
    projected = ObjectiveConfig(projection=True)
    objective = build_objective(projected, student, frozen).double()
    again, other = (build_objective(projected, student, frozen, seed).projections[0] for seed in (0, 1))
    assert torch.equal(again.weight.double(), objective.projections[0].weight)
    assert not torch.equal(again.weight, other.weight)
    terms = objective(student, batch, frozen(batch.input_ids))
    terms.loss.backward()
    mapped = objective.projections[0](student.distilbert(batch.input_ids).last_hidden_state)
    assert mapped.shape[-1] == 16
    before = objective.projections[0].weight.clone()
    torch.optim.SGD(objective.parameters(), 0.1).step()
    assert not torch.equal(before, objective.projections[0].weight)
    assert objective(student, batch, frozen(batch.input_ids)).cosine < terms.cosine


def test_terms_that_are_off_compute_nothing(models, batch, monkeypatch):
    teacher, student = models

    def never(*args, **kwargs):
        raise AssertionError("a term that is off was computed")

    mlm_only = objective_of(kd_weight=0, cosine_weight=0)
    rows = []
    monkeypatch.setattr("train.objective.distillation.hidden_cosine", never)
    original = vocabulary_loss
    monkeypatch.setattr(
        "train.objective.distillation.vocabulary_loss",
        lambda inputs, *args, **kwargs: (
            rows.append(inputs.features.shape[0]) or original(inputs, *args, **kwargs)
        ),
    )
    terms = mlm_only(student, batch)
    assert set(terms.as_dict()) == {"loss", "loss_mlm"}
    assert rows == [batch.positions.numel()]  # logits at masked positions only
    frozen = Teacher([teacher])
    no_mlm = objective_of(mlm_weight=0, cosine_weight=0)
    assert set(no_mlm(student, batch, frozen(batch.input_ids)).as_dict()) == {
        "loss",
        "loss_kd",
        "top1_agreement",
    }
    monkeypatch.undo()
    monkeypatch.setattr("train.objective.distillation.vocabulary_loss", never)
    monkeypatch.setattr("train.models.teacher.TeacherMember.decoder_inputs", never)
    cosine_only = objective_of(kd_weight=0, mlm_weight=0)
    assert set(cosine_only(student, batch, frozen(batch.input_ids)).as_dict()) == {"loss", "loss_cos"}


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


def test_evaluation_makes_no_gradients(models, batch, monkeypatch):
    """Autograd asks a Function for gradients under no_grad too, and they are two thirds of the work."""
    teacher, student = models
    frozen, objective = Teacher([teacher]), objective_of()
    products = []
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: products.append(1) or multiply(*args, **kwargs))
    with torch.no_grad():
        objective(student, batch, frozen(batch.input_ids))
    assert len(products) == 2  # one chunk: the student's logits and the teacher's
    saved = []
    monkeypatch.setattr("torch.autograd.function.FunctionCtx.save_for_backward", lambda *_: saved.append(1))
    with torch.no_grad():
        hidden_cosine(torch.ones(2, 3, requires_grad=True), torch.ones(2, 3), torch.ones(2))
    assert saved == []


def test_an_evaluation_in_inference_mode_leaves_training_possible(models, batch):
    teacher, student = models
    frozen, objective = Teacher([teacher]), objective_of()
    with torch.inference_mode():
        expected = objective(student, batch, frozen(batch.input_ids)).loss
    terms = objective(student, batch, frozen(batch.input_ids))
    terms.loss.backward()
    assert terms.loss.item() == expected.item()


def test_padding_may_hold_anything():
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


@pytest.mark.parametrize("size", [(0, 4), (5, 4)])
def test_hidden_cosine_equals_torch(size):
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()
    with torch.inference_mode():
        teacher = torch.randn(*size, generator=generator, dtype=torch.float64)
    weights = torch.rand(size[0], generator=generator, dtype=torch.float64)
    loss = hidden_cosine(student, teacher, weights)
    loss.backward()
    own, student.grad = student.grad, None
    each = torch.nn.CosineEmbeddingLoss(reduction="none")(student, teacher.clone(), torch.ones(size[0]))
    (each * weights).sum().backward()
    assert loss.item() == pytest.approx((each * weights).sum().item(), abs=1e-12)
    assert torch.allclose(own, student.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_teachers", [0, 1, 2])
def test_heldout_statistics_equal_full_logits(models, batch, num_teachers):
    teacher, student = models
    frozen = None
    if num_teachers:
        frozen = Teacher(
            [teacher, make_student(teacher, 3).double()][:num_teachers], [1.0, 3.0][:num_teachers]
        )
    sums = heldout_statistics(student, batch, frozen(batch.input_ids) if frozen else None, chunk_tokens=3)
    rows = torch.arange(3)[:, None].expand(3, 4)[batch.valid]
    columns, targets = batch.positions[batch.valid], batch.targets[batch.valid]
    log_student = torch.log_softmax(student(batch.input_ids).logits[rows, columns], -1)
    assert sums.count.item() == batch.valid.sum().item()
    assert sums.student_loss.item() == pytest.approx(
        torch.nn.functional.nll_loss(log_student, targets, reduction="sum").item(), rel=1e-10
    )
    assert sums.student_correct.item() == (log_student.argmax(-1) == targets).sum().item()
    if frozen is None:
        assert sums.kl is sums.agreement is sums.teacher_loss is sums.teacher_correct is None
        return
    soft = sum(
        share * torch.softmax(model(batch.input_ids).logits[rows, columns], -1)
        for share, model in zip(frozen.shares, frozen.models, strict=True)
    )
    assert sums.teacher_loss.item() == pytest.approx(
        torch.nn.functional.nll_loss(soft.log(), targets, reduction="sum").item(), rel=1e-10
    )
    assert sums.teacher_correct.item() == (soft.argmax(-1) == targets).sum().item()
    assert sums.agreement.item() == (soft.argmax(-1) == log_student.argmax(-1)).sum().item()
    expected = torch.nn.functional.kl_div(log_student, soft, reduction="sum")
    assert sums.kl.item() == pytest.approx(expected.item(), rel=1e-9)


def test_heldout_sums_leave_dropped_rows_out():
    rows = DecoderInputs(torch.tensor([[1.0], [float("nan")]]), torch.ones(3, 1), None)
    sums = heldout_sums(rows, [rows], torch.tensor([0, 0]), torch.tensor([True, False]))
    assert sums.count == 1
    assert sums.student_loss.item() == pytest.approx(math.log(3))
    assert sums.kl.item() == pytest.approx(0, abs=1e-6)


def test_accumulation_with_given_denominators_is_the_mean_over_all_tokens(models):
    """Two micro batches of unequal counts give the gradient of one batch, averaged as the engine does."""
    teacher, student = models
    frozen = Teacher([teacher])
    objective = objective_of()
    generator = torch.Generator().manual_seed(8)
    whole = random_batch(4, 12, 4, 50, generator, 0.6)
    mask = (torch.arange(12) < torch.tensor([12, 7, 9, 3])[:, None]).long()
    mask.scatter_(1, whole.positions, 1)
    student.zero_grad()
    objective(student, whole, frozen(whole.input_ids, mask), attention_mask=mask).loss.backward()
    expected = gradients(student)
    student.zero_grad()
    for part in (slice(0, 1), slice(1, 4)):
        micro = MaskedBatch(*(getattr(whole, f.name)[part] for f in dataclasses.fields(whole)))
        terms = objective(
            student,
            micro,
            frozen(micro.input_ids, mask[part]),
            attention_mask=mask[part],
            num_tokens=mask.sum() / 2,
            num_masked_tokens=float(whole.valid.sum()) / 2,
        )
        (terms.loss / 2).backward()
    for name, gradient in gradients(student).items():
        assert (gradient - expected[name]).abs().max() <= 1e-10 * max(1.0, expected[name].abs().max())


def test_student_in_autocast_and_under_compile(models, batch):
    teacher, student = (copy.deepcopy(model).float() for model in models)
    frozen, objective = Teacher([teacher]), objective_of(chunk_tokens=7)
    expected = objective(student, batch, frozen(batch.input_ids))
    expected.loss.backward()
    expected_gradients = gradients(student)
    compiled = torch.compile(objective, backend="aot_eager")
    student.zero_grad()
    terms = compiled(student, batch, frozen(batch.input_ids))
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    for name, gradient in gradients(student).items():
        assert torch.allclose(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5), name
    with torch.autocast("cpu", torch.bfloat16):
        terms = objective(student, batch, frozen(batch.input_ids))
    assert terms.loss.dtype == torch.float32
    assert terms.loss.item() == pytest.approx(expected.loss.item(), rel=0.1)


def test_models_that_cannot_be_compared_are_refused(models):
    from transformers import BertConfig, BertForMaskedLM

    teacher, student = models
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(UserError, match="vocabulary of 50 tokens, the teacher teacher 0 one of 60"):
        build_objective(ObjectiveConfig(), student, Teacher([BertForMaskedLM(config)]))
    mapped = ObjectiveConfig(layer_cosine_weight=1.0, layer_pairs=[(3, 4)])
    with pytest.raises(UserError, match=r"\(3, 4\); the student has layers 0 to 2, the teacher 0 to 4"):
        build_objective(mapped, student, Teacher([teacher], output_hidden_states=True))


def test_chunks_have_equal_sizes():
    weight = torch.empty(30522, 1)
    assert chunk_rows(1024, weight) == 256
    assert chunk_rows(300, weight) == 150
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


@pytest.mark.parametrize("terms", ["all", "cosine only"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_the_gradient_of_a_tied_weight_is_autograds(batch, terms, is_tied):
    """Padding ids, repeated ids, and a loss that reads the embedding but not the decoder."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=30,
        pad_token_id=1,
        tie_word_embeddings=is_tied,
        initializer_range=0.2,
    )
    teacher, student = (RobertaForMaskedLM(config).double().eval() for _ in range(2))
    input_ids = batch.input_ids.clone()
    input_ids[:, -3:] = 1
    input_ids[:, :2] = 7
    batch = dataclasses.replace(batch, input_ids=input_ids)
    weights = {"kd_weight": 0.0, "mlm_weight": 0.0} if terms == "cosine only" else {}
    student.zero_grad()
    objective_of(**weights)(student, batch, Teacher([teacher])(input_ids)).loss.backward()
    own = gradients(student)
    student.zero_grad()
    outputs = [model(input_ids, output_hidden_states=True) for model in (student, teacher)]
    expected = reference_cosine(outputs[0].hidden_states[-1], outputs[1].hidden_states[-1].detach())
    if not weights:
        reference = reference_terms(
            outputs[0].logits, [outputs[1].logits.detach()], [1.0], batch, temperature=2.0
        )
        expected = expected + 5 * reference.kd + 2 * reference.mlm
    expected.backward()
    wanted = gradients(student)
    assert own.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (own[name] - gradient).abs().max() <= 1e-10 * max(1.0, gradient.abs().max()), name


def test_no_host_scalar_is_assigned_by_index(batch):
    """On a GPU `t[index] = 1` copies the 1 from the host, and waits."""
    by_index = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.index_put_.default:
                by_index.append(args[2].dim())
            return function(*args, **(kwargs or {}))

    with Watch():
        select_tokens(batch, None, all_positions=True)
    assert by_index == [1, 1]


def test_the_engine_s_backward_prologue_runs(batch, models):
    """DeepSpeed hangs it on the tensors that it finds in what forward returns."""
    from deepspeed.runtime.utils import register_output_backward_hooks

    teacher, student = models
    terms = DistillationModule(student, objective_of())(batch, Teacher([teacher])(batch.input_ids))
    names = ["loss", "loss_kd", "loss_mlm", "loss_cos", "top1_agreement"]
    assert list(terms) == names
    assert [terms[name].requires_grad for name in names] == [True, False, False, False, False]
    calls = []
    register_output_backward_hooks(terms, lambda: calls.append("prologue"), lambda gradient: gradient)
    terms["loss"].backward()
    assert calls == ["prologue"]
