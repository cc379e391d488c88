"""What an objective does not train must not be trained by weight decay either."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from train.data.masking import MaskedBatch
from train.models.teacher import Teacher
from train.objective.distillation import DistillationLoss

NUM_TOKENS = 8


def freeze_untrained(
    objective: DistillationLoss, student: PreTrainedModel, teacher: Teacher | None, device: str
) -> list[str]:
    """Freeze the student's parameters that no gradient reaches, and return their names.

    With relations alone that is all that comes after the keys, queries and values of their layer. Decay would be all
    that moves such a parameter, and LAMB's trust ratio would make steps of the whole learning rate of it. Found by a
    forward and backward pass of one short sequence.

    Args:
        device: of the teacher; the objective and the student are moved there.
    """
    objective.to(device)
    moved: PreTrainedModel = student.to(device)  # type: ignore[arg-type]
    input_ids = torch.arange(NUM_TOKENS, device=device)[None] % student.config.vocab_size
    positions = input_ids.new_ones(1, 1)
    masked = MaskedBatch(input_ids, positions, positions, torch.ones_like(positions, dtype=torch.bool))
    with torch.random.fork_rng([] if device == "cpu" else [torch.device(device)]):
        objective(moved, masked, teacher(input_ids) if teacher is not None else None)["loss"].backward()
    frozen = [name for name, parameter in student.named_parameters() if parameter.grad is None]
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name not in frozen)
    for module in (objective, student):
        module.zero_grad(set_to_none=True)
    return frozen
