"""Attention by whole maps on a CPU, against torch's own and against fp64. With dropout in fp32: test_dropout.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from tests.unit.models.test_families import MODELS
from train.models.cpu import attention as cpu_attention


class Layer(torch.nn.Module):
    """What transformers hands to its attention functions."""

    is_causal = False


def outcome(
    vectors: list[torch.Tensor], mask: torch.Tensor | None, ours: bool, scale: float | None = None
) -> list[torch.Tensor]:
    """The mixed values and the gradients of query, key and value, in fp64."""
    query, key, value = (each.clone().requires_grad_() for each in vectors[:3])
    if ours:
        mixed, _ = cpu_attention.attention(Layer(), query, key, value, mask, scaling=scale)
    else:
        mixed = functional.scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(1, 2)
    mixed.backward(vectors[3].transpose(1, 2).to(mixed.dtype))
    return [
        mixed.detach().double(),
        *(each.grad.double() for each in (query, key, value) if each.grad is not None),
    ]


@pytest.mark.parametrize("masked", ["no mask", "padding", "added"])
@pytest.mark.parametrize("spread", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("shape", [(3, 2, 128, 64), (2, 3, 33, 20)])
def test_bf16_is_exact_to_its_roundings(shape: tuple[int, ...], spread: float, masked: str) -> None:
    """Scores, weights, values and each of their gradients are rounded once or twice, by 2**-9 at most; a score's
    rounding counts as often in a weight as the score is large."""
    generator = torch.Generator().manual_seed(3)
    vectors = [torch.randn(shape, generator=generator) * size for size in (spread, 1.0, 1.0, 1.0)]
    vectors = [each.bfloat16() for each in vectors]
    mask = None
    if masked != "no mask":
        mask = torch.ones(shape[0], 1, 1, shape[2], dtype=torch.bool)
        mask[1:, ..., shape[2] // 2 :] = False
        mask = mask.expand(-1, 1, shape[2], -1)
    if masked == "added" and mask is not None:
        mask = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, -1e30)
    exact = outcome([each.double() for each in vectors], None if mask is None else _wide(mask), ours=False)
    scale = 0.1
    for given, theirs in ((None, exact), (scale, None)):
        expected = theirs or outcome(
            [each.double() for each in vectors], None if mask is None else _wide(mask), False, scale
        )
        for found, wanted in zip(outcome(vectors, mask, True, given), expected, strict=True):
            assert float((found - wanted).norm() / wanted.norm()) <= 2**-8 * (1 + spread)


def test_a_row_that_sees_nothing_spoils_no_other() -> None:
    """As padding beyond the reach of a local layer (ModernBERT); a mask to add may have another format."""
    generator = torch.Generator().manual_seed(4)
    vectors = [torch.randn(2, 2, 9, 16, generator=generator).bfloat16() for _ in range(4)]
    seen = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    expected = outcome(vectors, seen, ours=True)[0]
    seen[1, :, 7] = False
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (seen, added):
        found = outcome(vectors, mask, ours=True)
        assert all(bool(each.isfinite().all()) for each in found)
        assert torch.equal(found[0][:, :7], expected[:, :7])


def test_dropout_in_bf16_is_torchs_on_the_maps() -> None:
    vectors = [
        torch.randn(2, 2, 9, 16, generator=torch.Generator().manual_seed(5)).bfloat16() for _ in range(3)
    ]
    query, key, value = (each.requires_grad_() for each in vectors)
    torch.manual_seed(6)
    mixed, _ = cpu_attention.attention(Layer(), query, key, value, None, dropout=0.3)
    torch.manual_seed(6)
    weights = functional.dropout(torch.softmax(query * 0.25 @ key.transpose(-2, -1), -1), 0.3)
    assert (weights == 0).any()
    assert torch.equal(mixed, (weights @ value).transpose(1, 2))


def _wide(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask.double()


def passes(model: torch.nn.Module) -> torch.Tensor:
    logits: torch.Tensor = model(
        torch.randint(5, 64, (2, 12), generator=torch.Generator().manual_seed(2))
    ).logits
    return logits


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert"])
def test_models_take_maps_in_training_in_bf16_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(
        cpu_attention,
        "_in_bf16",
        lambda query, key, value, mask, p: called.append(p) or torch.zeros_like(query),
    )
    plain = MODELS[name]().eval()
    model = cpu_attention.with_cpu_attention(copy.deepcopy(plain))
    assert torch.equal(passes(model), passes(plain))
    with torch.no_grad():
        passes(model.bfloat16())
    assert not called
    passes(model)
    assert called


def test_under_autocast_maps_are_in_bf16_and_without_it_fp32_is_torchs() -> None:
    plain = MODELS["bert"]().eval()
    model = cpu_attention.with_cpu_attention(copy.deepcopy(plain))
    assert torch.equal(passes(model), passes(plain))
    formats = set()

    def kept(x: torch.Tensor) -> torch.Tensor:
        formats.add((x.dtype, x.shape[-2:]))
        return x

    saved = torch.autograd.graph.saved_tensors_hooks(kept, lambda x: x)
    with saved, torch.autocast("cpu", torch.bfloat16):
        passes(model)
    maps = {dtype for dtype, shape in formats if tuple(shape) == (12, 12)}
    assert maps == {torch.bfloat16}


def test_long_sequences_have_torchs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "MAX_LENGTH", 11)
    monkeypatch.setattr(cpu_attention, "_in_bf16", None)
    passes(cpu_attention.with_cpu_attention(MODELS["bert"]().bfloat16().train()))
