"""What a narrower model keeps: every axis of every family, and what the text says carries most."""

from __future__ import annotations

import copy
from operator import attrgetter

import numpy as np
import pytest
import torch
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
)

from tests.unit.models.test_families import MODELS, SIZES, rough
from train.errors import UserError
from train.evaluation.importance import measure
from train.models.families import BERT, family_of
from train.models.narrowing import Kept, choose, narrow_weights
from train.models.students import make_student

TEXT = torch.randint(4, 64, (20, 30), generator=torch.Generator().manual_seed(0))
NARROW = {"width": 16, "feed_forward": 20}


@pytest.fixture(params=sorted(set(MODELS) - {"mpnet"}))  # whose heads share a table of relative positions
def teacher(request):
    torch.manual_seed(0)
    return rough(MODELS[request.param]())


def measured(family, model):
    return measure(family, model, TEXT, "cpu")


@torch.no_grad()
def test_at_full_size_the_weights_are_the_models_own(teacher):
    family = family_of(teacher)
    kept = choose(family, teacher.config, teacher.config, measured(family, teacher))
    found = narrow_weights(family, teacher, teacher, kept)
    assert all(torch.equal(value, found[name]) for name, value in teacher.state_dict().items())
    student = make_student(teacher, 4)
    again = make_student(teacher, 4, width=32, heads=4, feed_forward=48, measured=measured)
    for name, value in student.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert torch.equal(student.eval()(TEXT).logits, again.eval()(TEXT).logits)


@torch.no_grad()
def test_a_model_whose_parts_change_places_computes_the_same(teacher):
    """Every axis that is cut belongs to the part of the model that it is taken for: its order alone may change."""
    family, random = family_of(teacher), np.random.default_rng(0)
    narrower = make_student(teacher, 4, **NARROW) if family is not BERT else BertForMaskedLM(_narrow(teacher))
    heads = [random.permutation(4) for _ in range(4)]

    def within_heads():
        inside = [np.arange(8) if family.rotary else random.permutation(8) for _ in range(4)]
        return np.stack([np.concatenate([each * 8 + inside[each] for each in order]) for order in heads])

    values = within_heads()
    moved = Kept(
        hidden=random.permutation(32),
        queries=values if family.rotary else within_heads(),
        values=values,
        units=np.stack([random.permutation(48) for _ in range(4)]),
    )
    other = copy.deepcopy(teacher)
    other.load_state_dict(narrow_weights(family, teacher, narrower, moved))
    encoder, name = narrow_weights(family, teacher.base_model, narrower.base_model, moved), family.encoder
    assert all(torch.equal(value, other.state_dict()[f"{name}.{each}"]) for each, value in encoder.items())
    expected, found = teacher(TEXT).logits, other(TEXT).logits
    moved_parts = [
        not torch.equal(value, other.state_dict()[name]) for name, value in teacher.state_dict().items()
    ]
    assert sum(moved_parts) > 4 * 6
    assert (expected - found).abs().max() <= 2e-5 * expected.abs().max()


def _narrow(teacher):
    config = copy.deepcopy(teacher.config)
    config.hidden_size, config.num_attention_heads, config.intermediate_size = 16, 2, 20
    return config


@torch.no_grad()
def test_what_carries_nothing_is_left_out(teacher):
    """Dimensions, heads, halves of heads and units that are silenced: exactly they are not kept."""
    student = make_student(teacher, 4).eval()
    family = family_of(student)
    dead = torch.arange(0, 32, 2)
    for name, parameter in student.named_parameters():
        if parameter.shape == (32,) and "norm" in name.lower():
            parameter[dead] = 0.0
    for layer in family.layer_list(student):
        output, last = (attrgetter(path)(layer) for path in (family.attention_output, family.feed_forward[1]))
        output.weight[:, 8:16] = output.weight[:, 24:] = 0.0  # heads 1 and 3
        last.weight[:, 28:38] = 0.0
        for parameter in attrgetter(family.feed_forward[0])(layer).parameters():
            parameter[38:48] = 0.0  # what these units say is nothing, not what is made of it
        if family.rotary:
            output.weight[dead] = last.weight[dead] = 0.0
        else:
            query = attrgetter(family.projections[0])(layer)
            query.weight[::2] = query.bias[::2] = 0.0
    narrow = make_student(teacher, 4, width=16, feed_forward=28).config
    kept = choose(family, student.config, narrow, measured(family, student))
    assert kept.hidden.tolist() == list(range(1, 32, 2))
    assert kept.values.tolist() == [[*range(8), *range(16, 24)]] * 4
    assert kept.units.tolist() == [list(range(28))] * 4
    if not family.rotary:
        smaller = make_student(teacher, 4, width=16, heads=4).config
        odd = choose(family, student.config, smaller, measured(family, student)).queries
        assert odd.tolist() == [list(range(1, 32, 2))] * 4
    assert student.training is False
    assert not any(module._forward_pre_hooks for module in student.modules())


@torch.no_grad()
def test_narrower_students(teacher):
    student = make_student(teacher, 2, **NARROW, measured=measured)
    assert (student.config.hidden_size, student.config.num_attention_heads) == (16, 2)
    again = make_student(teacher, 2, **NARROW, measured=measured)
    shapes = make_student(teacher, 2, **NARROW)
    for name, value in student.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert value.shape == shapes.state_dict()[name].shape
    with torch.device("meta"):
        assert make_student(copy.deepcopy(teacher).to("meta"), 2, **NARROW).device.type == "meta"
    # Units alone: those that were silent are not missed.
    for layer in family_of(teacher).layer_list(teacher):
        attrgetter(family_of(teacher).feed_forward[1])(layer).weight[:, ::2] = 0.0
    expected = make_student(teacher, 4).eval()(TEXT).logits
    found = make_student(teacher, 4, feed_forward=24, measured=measured).eval()(TEXT).logits
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(MODELS))
def test_narrower_students_can_be_fine_tuned(name, tmp_path):
    heads = 4 if name == "mpnet" else None  # which keeps them
    make_student(rough(MODELS[name]()), 2, width=16, heads=heads).save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert classifier(TEXT).logits.shape == (20, 2)


@torch.no_grad()
@pytest.mark.parametrize("layer_map", ["every_other", "random"])
def test_a_size_of_heads_that_the_config_names_follows_the_students(layer_map):
    teacher = DebertaV2ForMaskedLM(DebertaV2Config(**SIZES, attention_head_size=8))
    student = make_student(teacher, 2, layer_map, width=16, heads=4)
    assert student.config.attention_head_size == 4
    student(TEXT)


@torch.no_grad()
def test_smaller_heads_keep_the_size_of_their_scores():
    teacher = rough(MODELS["roberta"]())
    student = make_student(teacher, 4, width=24, heads=4)  # the first 6 of each head's 8
    wide, narrow = (
        attrgetter("roberta.encoder.layer")(each)[1].attention.self for each in (teacher, student)
    )
    rows = [head * 8 + inside for head in range(4) for inside in range(6)]
    assert torch.allclose(narrow.query.bias, wide.query.bias[rows] * (6 / 8) ** 0.5)
    assert torch.equal(narrow.key.bias, wide.key.bias[rows])
    assert torch.equal(narrow.value.weight, wide.value.weight[rows][:, :24])


def test_mpnet_keeps_its_heads():
    """Whose bias of relative positions, one for each, all layers share."""
    teacher = rough(MODELS["mpnet"]())
    with pytest.raises(
        UserError,
        match=r"mpnet cannot inherit .*relative_attention_bias.weight \(32, 4\); keep the 4 heads \(model.stu",
    ):
        make_student(teacher, 2, width=16)
    student = make_student(teacher, 2, width=16, heads=4, measured=measured)
    bias = "mpnet.encoder.relative_attention_bias.weight"
    assert torch.equal(student.state_dict()[bias], teacher.state_dict()[bias])
    student(TEXT)


def test_embeddings_as_wide_as_the_encoder_get_narrower_with_it():
    teacher = ElectraForMaskedLM(ElectraConfig(**SIZES, embedding_size=32))
    student = make_student(teacher, 2, width=16)
    assert student.get_input_embeddings().weight.shape == (64, 16)
    student(TEXT)


@pytest.mark.parametrize("kind", [ElectraConfig, DebertaV2Config])
def test_a_width_at_which_the_embeddings_would_lose_their_map_is_refused(kind):
    """transformers has no such map where embeddings and hidden states are of one width."""
    model = MODEL_FOR_MASKED_LM_MAPPING[kind]
    wide = model(kind(**SIZES, embedding_size=16))
    with pytest.raises(
        UserError, match=r"model.student_width=16 is the width of the embeddings .*give another"
    ):
        make_student(wide, 2, width=16)
    make_student(wide, 2, width=16, layer_map="random")(TEXT)
    make_student(wide, 2)(TEXT)
