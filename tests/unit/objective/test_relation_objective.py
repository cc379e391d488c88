"""The relation term in the objective: models of every family, widths that differ, what is left untrained."""

from __future__ import annotations

import copy
from dataclasses import replace
from operator import attrgetter

import pytest
import torch

from tests.unit.models.test_families import MODELS, rough
from tests.unit.objective.given import assert_gradients, gradients
from train.config_sections.objective import ObjectiveConfig
from train.config_sections.training import OptimizerConfig
from train.data.masking import MaskedBatch, NoMasking
from train.errors import UserError
from train.models.attention_vectors import AttentionVectors
from train.models.families import family_of
from train.models.loading import load_masked_lm
from train.models.students import make_student
from train.models.teacher import Teacher
from train.objective.build import build_objective, relation_heads
from train.objective.reference import reference_relations
from train.objective.untrained import freeze_untrained
from train.optimizer import build_optimizer

RELATIONS = ObjectiveConfig(kd_weight=0, mlm_weight=0, cosine_weight=0, relation_weight=1)


def model_of(kind: str):
    torch.manual_seed(0)
    return rough(MODELS[kind]())


def unmasked(batch: int = 2, length: int = 10) -> MaskedBatch:
    ids = torch.randint(4, 64, (batch, length), generator=torch.Generator().manual_seed(3))
    return NoMasking()(ids, torch.arange(batch), 0)


def vectors_by_hand(model, layer, hidden):
    """From the layer's input, by the modules' names in transformers."""
    block = family_of(model).layer_list(model)[layer - 1]
    kind = model.config.model_type
    if kind == "modernbert":
        return block.attn.Wqkv(block.attn_norm(hidden)).split(32, -1)
    attention = block.attention
    if kind == "distilbert":
        return attention.q_lin(hidden), attention.k_lin(hidden), attention.v_lin(hidden)
    if kind == "mpnet":
        return attention.attn.q(hidden), attention.attn.k(hidden), attention.attn.v(hidden)
    names = ("query_proj", "key_proj", "value_proj") if kind == "deberta-v2" else ("query", "key", "value")
    return tuple(getattr(attention.self, name)(hidden) for name in names)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_vectors_are_the_layers_own(kind):
    model = model_of(kind)
    names, plain = list(model.state_dict()), copy.deepcopy(model)
    recorded = AttentionVectors(family_of(model), model, 3)
    ids = unmasked().input_ids
    with torch.no_grad():
        expected = plain(ids, output_hidden_states=True)
        encoded = family_of(model).encode(model, ids)
        assert torch.equal(encoded.last_hidden, expected.hidden_states[-1])
        by_hand = vectors_by_hand(plain, 3, expected.hidden_states[2])
    for own, other in zip(recorded.take(), by_hand, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_loss_and_gradients_are_the_formulas(kind):
    """A student of half the depth and width against a teacher of another depth; nothing else is computed."""
    teacher = model_of(kind)
    student = make_student(copy.deepcopy(teacher), 2, "random", width=16).double().eval()
    objective = build_objective(RELATIONS, student, Teacher([teacher.double()], relation_layers=[3]))
    masked = unmasked()
    terms = objective(student, masked, Teacher([teacher], relation_layers=[3])(masked.input_ids))
    terms["loss"].backward()
    assert set(terms) == {"loss", "loss_relation"}
    again = copy.deepcopy(student)
    again.zero_grad()
    recorded = [
        AttentionVectors(family_of(model), model, layer) for model, layer in ((again, 2), (teacher, 3))
    ]
    for model in (again, teacher):
        family_of(model).encode(model, masked.input_ids)
    own, theirs = (each.take() for each in recorded)
    expected = reference_relations(own, [each.detach() for each in theirs], 16)
    expected.backward()
    torch.testing.assert_close(terms["loss"], expected, rtol=1e-10, atol=1e-12)
    assert_gradients(student, gradients(again), 1e-12)


def calls_after(model, layer):
    """A list that grows with every call of a part that the vectors of this layer do not need."""
    family, calls = family_of(model), []
    first, *others = family.layer_list(model)[layer - 1 :]
    paths = [*family.projections, *([family.projection_norm] if family.projection_norm else [])]
    needed = {attrgetter(path)(first) for path in paths}
    for block in (first, *others):
        for part in block.modules():
            if part not in needed and not list(part.children()):
                part.register_forward_hook(lambda part, *_: calls.append(part))
    return calls


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_alone_nothing_after_the_relations_layer_is_computed(kind):
    """Of teacher and student; a whole pass gives the same loss."""
    teacher, masked = model_of(kind), unmasked()
    student = make_student(copy.deepcopy(teacher), 3).eval()
    alone = Teacher([teacher], relation_layers=[3], relations_alone=True)
    objective = build_objective(replace(RELATIONS, relation_layers=[(2, 3)]), student, alone)
    calls = [calls_after(teacher, 3), calls_after(student, 2)]
    loss = objective(student, masked, alone(masked.input_ids))["loss"]
    assert calls == [[], []]
    sums = objective.score_text(student, alone(masked.input_ids, whole=True), masked.input_ids)
    assert all(calls)
    assert loss.item() == pytest.approx(sums["loss_relation"].item() / masked.input_ids.numel(), rel=1e-6)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_family_is_distilled_and_leaves_as_a_folder(kind, tmp_path):
    """By all terms together, relations of a local layer of ModernBERT among them."""
    original = model_of(kind)
    teacher = Teacher([original], relation_layers=[3])
    student = make_student(copy.deepcopy(original), 2)
    settings = ObjectiveConfig(relation_weight=1)
    objective = build_objective(settings, student, teacher)
    ids = unmasked(4, 16).input_ids
    positions = torch.tensor([[2, 5]] * 4)
    masked = MaskedBatch(ids, positions, ids.gather(1, positions), torch.ones(4, 2, dtype=torch.bool))
    optimizer = build_optimizer(OptimizerConfig(name="adamw", lr=3e-3), student.named_parameters())
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        terms = objective(student.eval(), masked, teacher(ids))
        terms["loss"].backward()
        optimizer.step()
        losses.append({name: float(value.detach()) for name, value in terms.items()})
    for name in ("loss", "loss_kd", "loss_cos", "loss_relation"):
        assert losses[-1][name] < losses[0][name], (name, losses)
    student.save_pretrained(tmp_path)
    again = load_masked_lm(str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, student(ids).logits)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_without_heads_it_is_the_same_to_the_bit(kind):
    """Loss and gradients of relations and of both cosines, where neither model has an MLM head."""
    settings = ObjectiveConfig(
        kd_weight=0, mlm_weight=0, relation_weight=1, layer_cosine_weight=1, layer_pairs=[(1, 3)]
    )
    masked, found = unmasked(), []
    for with_head in (True, False):
        teacher = model_of(kind)
        teacher = teacher if with_head else teacher.base_model
        student = make_student(copy.deepcopy(teacher), 2).eval()
        frozen = Teacher([teacher], output_hidden_states=True, relation_layers=[4])
        terms = build_objective(settings, student, frozen)(student, masked, frozen(masked.input_ids))
        terms["loss"].backward()
        found.append((terms, gradients(student.base_model)))
    (terms, headed), (bare_terms, bare) = found
    assert terms.keys() == bare_terms.keys() == {"loss", "loss_cos", "loss_layer_cos", "loss_relation"}
    assert all(torch.equal(value, bare_terms[name]) for name, value in terms.items())
    assert headed.keys() == bare.keys()
    assert all(torch.equal(value, bare[name]) for name, value in headed.items())


def test_an_ensemble_is_its_members_by_share():
    teachers, masked = [model_of("bert"), rough(model_of("bert"))], unmasked()
    student = make_student(copy.deepcopy(teachers[0]), 2).eval()
    alone = []
    for teacher, layer in zip(teachers, (4, 2), strict=True):
        single = Teacher([teacher], relation_layers=[layer])
        alone.append(
            build_objective(RELATIONS, student, single)(student, masked, single(masked.input_ids))["loss"]
        )
    both = Teacher(teachers, [1, 3], relation_layers=[4, 2])
    loss = build_objective(RELATIONS, student, both)(student, masked, both(masked.input_ids))["loss"]
    assert loss.item() == pytest.approx((alone[0] / 4 + alone[1] * 3 / 4).item(), rel=1e-6)


def test_it_stands_beside_the_other_terms():
    teacher = model_of("bert")
    student = make_student(copy.deepcopy(teacher), 2).eval()
    ids = unmasked().input_ids
    positions = torch.tensor([[2, 5], [1, 7]])
    masked = MaskedBatch(ids, positions, ids.gather(1, positions), torch.ones(2, 2, dtype=torch.bool))
    frozen = Teacher([teacher], relation_layers=[4])
    published = build_objective(ObjectiveConfig(), student, frozen)(student, masked, frozen(ids))
    relations = build_objective(RELATIONS, student, frozen)(student, masked, frozen(ids))
    both = build_objective(ObjectiveConfig(relation_weight=3), student, frozen)(student, masked, frozen(ids))
    expected = published["loss"].item() + 3 * relations["loss"].item()
    assert both["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_what_no_gradient_reaches_is_frozen():
    """With relations of the last layer alone: its own output, the feed-forward part and the head."""
    teacher = model_of("bert")
    student = make_student(copy.deepcopy(teacher), 2)
    frozen = Teacher([teacher], relation_layers=[4])
    names = freeze_untrained(build_objective(RELATIONS, student, frozen), student, frozen, "cpu")
    last = "distilbert.transformer.layer.1."
    assert {name for name in names if not name.startswith(("vocab_", last))} == set()
    assert f"{last}attention.out_lin.weight" in names
    assert f"{last}ffn.lin1.weight" in names
    assert "vocab_transform.weight" in names
    assert f"{last}attention.q_lin.weight" not in names
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in student.named_parameters()} - set(names)
    assert all(parameter.grad is None for parameter in student.parameters())
    published = build_objective(ObjectiveConfig(), student, frozen)
    assert freeze_untrained(published, student.requires_grad_(True), frozen, "cpu") == []


def test_relation_heads():
    assert relation_heads(None, [768, 384]) == 48
    assert relation_heads(None, [384, 256]) == 32
    assert relation_heads(None, [30, 20]) == 10
    assert relation_heads(6, [30, 12]) == 6
    with pytest.raises(
        UserError, match=r"relation_heads=4 does not divide the widths 30, 20; these do: 1, 2, 5, 10"
    ):
        relation_heads(4, [30, 20])


def test_layers_that_do_not_exist_are_refused():
    teacher = model_of("bert")
    student = make_student(copy.deepcopy(teacher), 2)
    with pytest.raises(UserError, match="names layer 5 of teacher teacher 0, which has 4"):
        Teacher([teacher], relation_layers=[5])
    frozen = Teacher([teacher, teacher], relation_layers=[4, 4])
    for layers, message in (
        ([(3, 4), (3, 4)], "layer 3 of the student, which has 2"),
        ([(1, 4), (2, 4)], "name the same student layer in every pair"),
    ):
        asked = ObjectiveConfig(relation_weight=1, relation_layers=layers)
        with pytest.raises(UserError, match=message):
            build_objective(asked, student, frozen)
