"""A student's compiled layers give the values and gradients of the plain ones, and what hangs on layers goes on."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.unit.models.test_families import MODELS
from train.errors import UserError
from train.models.attention_vectors import AttentionVectors
from train.models.compilation import compile_layers
from train.models.families import family_of


def test_values_gradients_hidden_states_and_relation_vectors() -> None:
    """Sums of up to 64 fp32 numbers in another order."""
    torch.manual_seed(0)
    plain = MODELS["distilbert"]().eval()
    compiled = copy.deepcopy(plain)
    input_ids = torch.randint(5, plain.config.vocab_size, (3, 12))
    outcomes = []
    for model in (plain, compiled):
        family = family_of(model)
        recorded = AttentionVectors(family, model, family.num_layers(model))
        if model is compiled:
            compile_layers(model, "cpu")
        encoded = family.encode(model, input_ids, None, output_hidden_states=True)
        assert encoded.hidden_states is not None
        parts = [*encoded.hidden_states, *recorded.take()]
        with recorded.alone():
            family.encode(model, input_ids)
        parts += recorded.take()
        torch.stack([(part * torch.linspace(-1, 1, part.shape[-1])).sum() for part in parts]).sum().backward()
        gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        outcomes.append((parts, gradients))
    (parts, gradients), (found, of_compiled) = outcomes
    assert gradients.keys() == of_compiled.keys()
    largest = max(float(each.abs().max()) for each in gradients.values())
    for name, expected in gradients.items():
        torch.testing.assert_close(of_compiled[name], expected, rtol=1e-5, atol=1e-6 * largest, msg=name)
    for part, expected in zip(found, parts, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)


def test_without_a_cpp_compiler_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = MODELS["distilbert"]()
    with pytest.raises(
        UserError, match=r"no-such-compiler is not found; install it .*leave student_compile out"
    ):
        compile_layers(model, "cpu")
    compile_layers(model, "cuda:0")
