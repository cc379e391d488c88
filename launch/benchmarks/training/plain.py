"""The original code's formulation of a step, for the trainer: both models' logits at all positions, torch's dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from launch.benchmarks.objective_steps import original_loss
from train.build import Parts
from train.data.masking import MaskedBatch
from train.models.cpu.dropout import FastDropout


class PlainTeacher:
    """Stands where train/models/teacher.py does; returns the whole output."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor) -> Any:
        """Logits and hidden states of (B, L) tokens."""
        return self.model(input_ids, output_hidden_states=True)


class PlainObjective(nn.Module):
    """Stands where train/objective/distillation.py does."""

    def forward(
        self, student: PreTrainedModel, masked: MaskedBatch, taught: Any, *, num_masked_tokens: Any = None
    ) -> dict[str, torch.Tensor]:
        """The triple loss; its means are this micro batch's own, whatever `num_masked_tokens` says."""
        return {"loss": original_loss(student(masked.input_ids, output_hidden_states=True), taught, masked)}


def make_plain(parts: Parts) -> None:
    """Have a run of the triple loss compute as the original code did; data, engine and optimizer stay."""
    assert parts.teacher is not None
    for module in parts.student.modules():
        if type(module) is FastDropout:
            module.__class__ = nn.Dropout  # type: ignore[assignment]
    parts.student.set_attn_implementation("sdpa")
    stand_in: Any = PlainTeacher(parts.teacher.models[0])
    parts.trainer.teacher = stand_in
    parts.trainer.engine.module.objective = PlainObjective()
