"""Random batches and decoders, and an objective of some settings."""

from __future__ import annotations

import math

import torch

from train.config_sections.objective import ObjectiveConfig
from train.data.masking import MaskedBatch
from train.models.families import DecoderInputs
from train.objective.distillation import DistillationLoss
from train.objective.token_selection import SelectedTokens


def random_batch(batch, length, masked, vocabulary, generator, valid_share=0.8):
    """Masked positions; those that are not valid repeat one that may be."""
    order = torch.rand(batch, length, generator=generator).argsort(-1)[:, :masked].sort(-1).values
    valid = torch.rand(batch, masked, generator=generator) < valid_share
    return MaskedBatch(
        input_ids=torch.randint(vocabulary, (batch, length), generator=generator),
        positions=torch.where(valid, order, order[:, :1]),
        targets=torch.randint(vocabulary, (batch, masked), generator=generator),
        valid=valid,
    )


def random_decoder(shape, generator, has_bias):
    tokens, vocabulary, width = shape
    scale = 3.0 / math.sqrt(width)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    return DecoderInputs(
        scale * draw(tokens, width), draw(vocabulary, width), draw(vocabulary) if has_bias else None
    )


def selected(row_weights, targets=(), target_weights=()):
    """Tokens in their own order."""
    return SelectedTokens(
        torch.arange(len(row_weights)),
        torch.as_tensor(row_weights),
        torch.as_tensor(targets, dtype=torch.int64),
        torch.as_tensor(target_weights),
    )


def objective_of(chunk_tokens=None, **settings):
    return DistillationLoss(ObjectiveConfig(**settings), chunk_tokens=chunk_tokens)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(model, expected, tolerance=1e-10):
    """Those that the model holds are there for the same parameters, and as near as sums in fp64 are."""
    own = gradients(model)
    assert own.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (own[name] - gradient).abs().max() <= tolerance * max(1.0, gradient.abs().max()), name
