"""The fused objective under ZeRO-2 on two ranks, against one process with full logits and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.ranks.harness import run_ranks
from tests.distributed.workers import objective as workers
from train.objective.reference import reference_cosine, reference_terms

WORLD_SIZE = 2


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks("tests.distributed.workers.objective:scenarios", WORLD_SIZE)


def initial() -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in workers.make_models()[1].named_parameters()}


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Any]]:
    """Plain SGD on the whole global batch: the formula as written, in fp64."""
    teachers, student = workers.make_models()
    teachers, student = [teacher.double().eval() for teacher in teachers], student.double()
    shares = [share / sum(workers.SHARES) for share in workers.SHARES]
    history = []
    for step in range(workers.STEPS):
        batch, mask = workers.make_batch(step, WORLD_SIZE)
        own = student(batch.input_ids, mask, output_hidden_states=True)
        with torch.no_grad():
            taught = [teacher(batch.input_ids, mask, output_hidden_states=True) for teacher in teachers]
        terms = reference_terms(
            own.logits, [each.logits for each in taught], shares, batch, mask, temperature=2.0
        )
        cosines = [reference_cosine(own.hidden_states[-1], each.hidden_states[-1], mask) for each in taught]
        cosine = sum(share * each for share, each in zip(shares, cosines, strict=True))
        loss = 5 * terms.kd + 2 * terms.mlm + cosine
        student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= workers.LR * parameter.grad
        parameters = {name: p.detach().clone() for name, p in student.named_parameters()}
        history.append({"parameters": parameters, "loss": loss.item()})
    return history


def test_fp32_steps_with_accumulation_and_unequal_counts(ranks, expected):
    for result in ranks:
        for own, other in zip(result["fp32"]["history"], expected, strict=True):
            assert own["loss"] == pytest.approx(other["loss"], rel=1e-5)
            for name, parameter in other["parameters"].items():
                assert torch.allclose(own["parameters"][name].double(), parameter, rtol=1e-4, atol=2e-6), name
    assert expected[-1]["loss"] < expected[0]["loss"]


def test_fp16_steps_with_loss_scaling(ranks, expected):
    """fp16 rounds activations; the update of every tensor must still point and reach where it should."""
    before = initial()
    own, other = ranks[0]["fp16"]["history"][0], expected[0]
    assert own["loss"] == pytest.approx(other["loss"], rel=5e-3)
    for name, start in before.items():
        wanted = (other["parameters"][name] - start.double()).flatten()
        found = (own["parameters"][name].double() - start.half().double()).flatten()
        if wanted.norm() > 1e-5:  # the keys' biases have no gradient but rounding
            assert (found - wanted).norm() < 0.03 * wanted.norm(), name
    assert [each["skipped"] for each in ranks[0]["fp16"]["history"]] == [0, 0, 0]


def test_an_overflow_skips_the_step_on_all_ranks(ranks):
    for result in ranks:
        first = result["overflow"]["history"][0]
        assert first["skipped"] == 1
        for name, start in initial().items():
            assert torch.equal(first["parameters"][name], start.half().float())
