"""The fused objective under ZeRO-2 on two ranks, against one process with full logits and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.ranks.harness import run_ranks
from tests.distributed.workers import objective as workers
from train.data.masking import MaskedBatch
from train.objective.reference import reference_cosine, reference_embeddings, reference_terms

WORLD_SIZE = 2


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks("tests.distributed.workers.objective:scenarios", WORLD_SIZE)


def initial() -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in workers.make_models()[1].named_parameters()}


def plain_sgd(loss_of: Callable[..., torch.Tensor]) -> list[dict[str, Any]]:
    """On the whole global batch, the formula as written, in fp64.

    Args:
        loss_of: takes the student's output, the teachers', the masked batch and the padding mask.
    """
    teachers, student = workers.make_models()
    teachers, student = [teacher.double().eval() for teacher in teachers], student.double()
    history = []
    for step in range(workers.STEPS):
        batch, mask = workers.make_batch(step, WORLD_SIZE)
        own = student(batch.input_ids, mask, output_hidden_states=True)
        with torch.no_grad():
            taught = [teacher(batch.input_ids, mask, output_hidden_states=True) for teacher in teachers]
        loss = loss_of(own, taught, batch, mask)
        student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.grad is not None:
                    parameter -= workers.LR * parameter.grad
        parameters = {name: p.detach().clone() for name, p in student.named_parameters()}
        history.append({"parameters": parameters, "loss": loss.item()})
    return history


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Any]]:
    shares = [share / sum(workers.SHARES) for share in workers.SHARES]

    def loss_of(own: Any, taught: list[Any], batch: MaskedBatch, mask: torch.Tensor) -> torch.Tensor:
        terms = reference_terms(
            own.logits, [each.logits for each in taught], shares, batch, mask, temperature=2.0
        )
        cosines = [reference_cosine(own.hidden_states[-1], each.hidden_states[-1], mask) for each in taught]
        cosine = sum(share * each for share, each in zip(shares, cosines, strict=True))
        return 5 * terms.kd + 2 * terms.mlm + cosine

    return plain_sgd(loss_of)


@pytest.fixture(scope="module")
def expected_embeddings() -> list[dict[str, Any]]:
    return plain_sgd(
        lambda own, taught, _, mask: reference_embeddings(
            own.hidden_states[-1], taught[0].hidden_states[-1], "mean", mask
        )
    )


@pytest.mark.parametrize(
    ("scenario", "formula"), [("fp32", "expected"), ("embeddings", "expected_embeddings")]
)
def test_fp32_steps_with_accumulation_and_unequal_counts(
    ranks: list[dict[str, Any]], scenario: str, formula: str, request: pytest.FixtureRequest
) -> None:
    expected = request.getfixturevalue(formula)
    for result in ranks:
        for own, other in zip(result[scenario]["history"], expected, strict=True):
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
