"""The FLOP count, by hand and against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.models.test_families import MODELS
from train.models.attention_vectors import AttentionVectors
from train.models.families import ELECTRA, family_of
from train.models.flops import (
    ModelShape,
    RelationLayers,
    forward_flops_per_token,
    measured_matrix_rate,
    shape_of,
    training_flops_per_token,
)

SHAPE = ModelShape(layers=1, width=4, feed_forward=16, vocabulary=10, embedding=4)
LAYER = 8 * 16 + 4 * 4 * 16 + 4 * 5 * 4


def test_one_layer_by_hand() -> None:
    assert forward_flops_per_token(SHAPE, sequence_length=5, decoded_share=0.0) == LAYER
    assert forward_flops_per_token(SHAPE, 5, 0.5) == LAYER + 0.5 * (2 * 16 + 2 * 4 * 10)


@pytest.mark.parametrize("alone", [False, True])
def test_relations_by_hand(alone: bool) -> None:
    deep = ModelShape(layers=3, width=4, feed_forward=16, vocabulary=10, embedding=4)
    relations = RelationLayers(1, (2,), student_alone=alone, teachers_alone=alone)
    found = training_flops_per_token(SHAPE, [deep], 5, 0, "none", relations)
    projections, product = 6 * 16, 2 * 5 * 4
    assert found.student == 3 * (projections if alone else LAYER) + 3 * 2 * product
    assert found.teachers == (LAYER + projections if alone else 3 * LAYER) + 3 * product


def counted(run) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_a_pass_that_ends_early_equals_torchs_count() -> None:
    model = MODELS["bert"]().eval()
    model.set_attn_implementation("eager")
    ids, shape = torch.randint(0, 64, (3, 16)), shape_of(model)
    with AttentionVectors(family_of(model), model, 2).alone():
        ended = forward_flops_per_token(shape, 16, 0.0, ends_at=2)
        assert counted(lambda: family_of(model).encode(model, ids)) == 3 * 16 * ended


@pytest.mark.parametrize("kind", [kind for kind in MODELS if not kind.startswith("deberta")])
def test_every_family_equals_torchs_count(kind: str) -> None:
    """DeBERTa's products with positions are left out."""
    model = MODELS[kind]().eval()
    model.set_attn_implementation("eager")
    ours = forward_flops_per_token(shape_of(model), sequence_length=16, decoded_share=1.0)
    ids = torch.randint(0, 64, (3, 16))
    assert counted(lambda: model(ids)) == 3 * 16 * ours
    if kind == "electra":
        assert ELECTRA.decoder(model)[0].shape == (64, 24), "narrower than the encoder"


def test_matrix_rate_is_plausible() -> None:
    assert 1e8 < measured_matrix_rate("cpu", torch.float32, size=128) < 1e14
