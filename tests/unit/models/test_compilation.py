"""A student's compiled layers give the values and gradients of the plain ones, and what hangs on layers goes on."""

from __future__ import annotations

import copy
from functools import partialmethod
from typing import Any

import pytest
import torch

from tests.unit.models.test_families import MODELS
from train.errors import UserError
from train.models.attention_vectors import AttentionVectors
from train.models.compilation import compile_layers, require_compiler
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
            compile_layers(model)
        encoded = family.encode(model, input_ids, None, output_hidden_states=True)
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


def test_no_layer_is_left_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, recorded and skipped layers, training and scoring, an odd last batch, a second length."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    made = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        made.append(graph)
        return graph.forward

    model = MODELS["distilbert"]()
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    family = family_of(model)
    recorded = AttentionVectors(family, model, family.num_layers(model) - 1)
    compile_layers(model)
    for training in (True, False):
        model.train(training)
        for shape in ((4, 16), (4, 16), (3, 16), (4, 8)):
            with torch.set_grad_enabled(training), recorded.alone():
                family.encode(model, torch.ones(shape, dtype=torch.long))
            with torch.set_grad_enabled(training):
                family.encode(model, torch.ones(shape, dtype=torch.long))
    found = len(made)
    family.encode(model.train(), torch.ones((4, 16), dtype=torch.long))
    assert 8 < found == len(made)


def test_without_a_cpp_compiler_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UserError, match=r"model.student_compile=true: .*no-such-compiler is not found; install it"
    ):
        require_compiler("model.student_compile", "cpu")
    require_compiler("model.student_compile", "cuda:0")
