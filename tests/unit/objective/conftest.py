"""Two tiny models and a batch; the forms of the losses over the vocabulary."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.unit.objective.given import random_batch
from train.models.students import make_student
from train.objective import fused_loss, vocabulary_native
from train.objective.chunk_terms import chunk_terms


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


@pytest.fixture(params=["C loops", "torch operations"])
def form(request):
    """Of one teacher or none on a CPU; several teachers always have torch operations."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch operations":
            patch.setattr(fused_loss, "fastest_terms", lambda device, dtype: chunk_terms)
        elif shutil.which("cc") is None:
            pytest.skip("no C compiler")
        else:
            assert vocabulary_native.build(torch.float32) is not None
        yield request.param
