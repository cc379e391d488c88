"""Our dropout against torch's: the same bits of values, gradients and the generator's state."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from tests.unit.models.test_families import MODELS
from train.loop.trainer import Trainer
from train.models.cpu import dropout
from train.models.cpu.attention import with_cpu_attention

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def outcome(drop: Callable[..., torch.Tensor], x: torch.Tensor, drawn_before: int) -> list[torch.Tensor]:
    """Values, gradient and the generator's state after two calls."""
    torch.manual_seed(11)
    torch.empty(drawn_before).random_()
    x = x.clone().requires_grad_()
    y = drop(drop(x, 0.1), 0.35)
    y.backward(torch.linspace(-3, 3, x.numel()).view(x.shape).to(x.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad, torch.get_rng_state()]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drawn_before", [0, 1, 623])
@pytest.mark.parametrize("shape", [(), (3, 311), (7, 5, 401)])
def test_equals_torch(shape: tuple[int, ...], drawn_before: int, dtype: torch.dtype) -> None:
    """At any place in the twister's block of 624 words, of which each element takes two."""
    assert dropout.build() is not None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    if x.numel() > 100:
        x.view(-1)[:90] = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype).repeat(30)
    pairs = zip(
        outcome(dropout.dropout, x, drawn_before), outcome(functional.dropout, x, drawn_before), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@needs_compiler
def test_on_two_threads() -> None:
    torch.set_num_threads(2)
    x = torch.randn(3, 100_001)
    for ours, theirs in zip(outcome(dropout.dropout, x, 3), outcome(functional.dropout, x, 3), strict=True):
        assert torch.equal(ours, theirs)


def pass_of(model: PreTrainedModel, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Logits and gradients of one pass in training mode."""
    torch.manual_seed(5)
    input_ids = torch.randint(5, 64, (3, 16), generator=torch.Generator().manual_seed(2))
    logits = model(input_ids, attention_mask=mask).logits
    logits.float().square().mean().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [logits.detach(), *grads, torch.get_rng_state()]


@needs_compiler
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in MODELS),
        ("deberta-v2", torch.bfloat16),  # in bf16 the others have theirs from attention.py
    ],
)
def test_a_model_computes_what_it_did(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded batches too; torch's own dropout is not called where ours can be."""
    plain = MODELS[name]().to(dtype).train()
    padded = torch.ones(3, 16, dtype=torch.long)
    padded[1, 9:] = 0
    expected = {mask is None: pass_of(copy.deepcopy(plain), mask) for mask in (None, padded)}
    fast = dropout.with_fast_dropout(with_cpu_attention(copy.deepcopy(plain)))
    assert fast.state_dict().keys() == plain.state_dict().keys()
    assert fast.config.to_dict() == plain.config.to_dict()
    for mask in (None, padded):
        for ours, theirs in zip(pass_of(copy.deepcopy(fast), mask), expected[mask is None], strict=True):
            assert torch.equal(ours, theirs)
    if name == "bert":
        monkeypatch.setattr(functional, "dropout", None)
        monkeypatch.setattr(functional, "scaled_dot_product_attention", None)
        pass_of(fast, None)


@needs_compiler
def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(50, requires_grad=True)
    (grad,) = torch.autograd.grad(dropout.dropout(x, 0.1).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("why", ["no compiler", "other numbers"])
def test_torchs_own_where_ours_would_not_do(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "no compiler":
        monkeypatch.setenv("CC", str(tmp_path / "none"))
    else:
        source = tmp_path / "dropout.c"
        source.write_text(dropout.SOURCE.read_text().replace("0xefc60000u", "0xefc70000u"))
        monkeypatch.setattr(dropout, "SOURCE", source)
    monkeypatch.setattr(dropout, "build", dropout.build.__wrapped__)
    assert dropout.build() is None
    x = torch.randn(50)
    for ours, theirs in zip(outcome(dropout.dropout, x, 0), outcome(functional.dropout, x, 0), strict=True):
        assert torch.equal(ours, theirs)


def test_a_runs_masks_follow_from_its_seed_on_a_cpu_too() -> None:
    """A CPU's generator takes the low 32 bits of its seed alone."""
    engine = SimpleNamespace(
        train_batch_size=lambda: 64,
        train_micro_batch_size_per_gpu=lambda: 16,
        gradient_accumulation_steps=lambda: 2,
    )
    anything: Any = None

    def mask(seed: int, micro_step: int = 1) -> torch.Tensor:
        trainer = Trainer(engine, anything, anything, {"total_steps": 9}, seed, rank=1, clock=anything)
        trainer._seed_dropout(5, micro_step)
        return functional.dropout(torch.ones(1000), 0.1)

    masks = [mask(seed) for seed in (0, 1, 2, 3, 2**23, 2**31 - 1)] + [mask(0, 0), mask(1, 0)]
    assert not any(torch.equal(one, other) for one, other in combinations(masks, 2))
    torch.manual_seed(5 * 4 + 2 + 1)  # by the micro batch's number alone, as ever
    assert torch.equal(functional.dropout(torch.ones(1000), 0.1), mask(0))
