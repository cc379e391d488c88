"""Two tiny models and a batch."""

from __future__ import annotations

import pytest
import torch

from tests.unit.objective.given import random_batch
from train.models.students import make_student


@pytest.fixture(scope="module")
def models():
    """A tiny BERT teacher with rough weights, and a student of half its depth, both fp64 and in eval mode."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        initializer_range=0.3,
    )
    teacher = BertForMaskedLM(config)
    student = make_student(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return teacher.double().eval(), student.double().eval()


@pytest.fixture
def batch():
    return random_batch(3, 12, 4, 50, torch.Generator().manual_seed(5))
