"""The whole objective of two models against the published code, autograd and torch."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.objective.given import assert_gradients, gradients, objective_of, random_batch
from train.config_sections.objective import ObjectiveConfig
from train.data.masking import MaskedBatch
from train.errors import UserError
from train.loop.trainer import DistillationModule
from train.models.students import make_student
from train.models.teacher import Teacher
from train.objective.build import build_objective
from train.objective.distillation import DistillationLoss
from train.objective.fused_loss import vocabulary_loss
from train.objective.hidden_loss import hidden_cosine
from train.objective.reference import original_distiller_loss, reference_cosine, reference_terms
from train.objective.token_selection import select_tokens


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
    terms["loss"].backward()
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-12)
    assert_gradients(student, expected_gradients)
    assert list(terms) == ["loss", "loss_kd", "loss_mlm", "loss_cos", "loss_mse", "top1_agreement"]
    total = 5 * terms["loss_kd"] + 2 * terms["loss_mlm"] + terms["loss_cos"] + 0.7 * terms["loss_mse"]
    assert terms["loss"].item() == pytest.approx(total.item(), rel=1e-12)


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
    terms["loss"].backward()
    own = gradients(student)
    student.zero_grad()
    hidden = [model(batch.input_ids, output_hidden_states=True).hidden_states for model in (student, teacher)]
    cosines = [reference_cosine(hidden[0][i], hidden[1][j].detach()) for i, j in pairs]
    (1.5 * sum(cosines) / 3).backward()
    assert terms["loss_layer_cos"].item() == pytest.approx(sum(cosines).item() / 3, rel=1e-9)
    assert_gradients(student, own, 1e-9)


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
    terms["loss"].backward()
    mapped = objective.projections[0](student.distilbert(batch.input_ids).last_hidden_state)
    assert mapped.shape[-1] == 16
    before = objective.projections[0].weight.clone()
    torch.optim.SGD(objective.parameters(), 0.1).step()
    assert not torch.equal(before, objective.projections[0].weight)
    assert objective(student, batch, frozen(batch.input_ids))["loss_cos"] < terms["loss_cos"]


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
    assert set(terms) == {"loss", "loss_mlm"}
    assert rows == [batch.positions.numel()]  # logits at masked positions only
    frozen = Teacher([teacher])
    no_mlm = objective_of(mlm_weight=0, cosine_weight=0)
    found = no_mlm(student, batch, frozen(batch.input_ids))
    assert set(found) == {"loss", "loss_kd", "top1_agreement"}
    monkeypatch.undo()
    monkeypatch.setattr("train.objective.distillation.vocabulary_loss", never)
    monkeypatch.setattr("train.models.teacher.TeacherOutput.decoder_inputs", never)
    cosine_only = objective_of(kd_weight=0, mlm_weight=0)
    assert set(cosine_only(student, batch, frozen(batch.input_ids))) == {"loss", "loss_cos"}


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
        expected = objective(student, batch, frozen(batch.input_ids))["loss"]
    terms = objective(student, batch, frozen(batch.input_ids))
    terms["loss"].backward()
    assert terms["loss"].item() == expected.item()


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
    objective(student, whole, frozen(whole.input_ids, mask), attention_mask=mask)["loss"].backward()
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
        (terms["loss"] / 2).backward()
    assert_gradients(student, expected)


def test_student_in_autocast_and_under_compile(models, batch):
    teacher, student = (copy.deepcopy(model).float() for model in models)
    frozen, objective = Teacher([teacher]), objective_of(chunk_tokens=7)
    expected = objective(student, batch, frozen(batch.input_ids))
    expected["loss"].backward()
    expected_gradients = gradients(student)
    compiled = torch.compile(objective, backend="aot_eager")
    student.zero_grad()
    terms = compiled(student, batch, frozen(batch.input_ids))
    terms["loss"].backward()
    assert terms["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    for name, gradient in gradients(student).items():
        assert torch.allclose(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5), name
    with torch.autocast("cpu", torch.bfloat16):
        terms = objective(student, batch, frozen(batch.input_ids))
    assert terms["loss"].dtype == torch.float32
    assert terms["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.1)


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
    objective_of(**weights)(student, batch, Teacher([teacher])(input_ids))["loss"].backward()
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
    assert_gradients(student, own)


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
