"""Held-out scores: the same windows and the same masks at every evaluation."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from data_prep.shard_format.manifest import TokenizerInfo
from train.evaluation.masking import LABEL, evaluation_label, evaluation_masker
from train.evaluation.scores import HeldoutSums, heldout_statistics
from train.models.families import family_of
from train.models.teacher import Teacher
from train.objective.distillation import DistillationLoss

# Masks are drawn per epoch; no training epoch has this number.
HELDOUT_EPOCH = -1


class HeldoutEvaluation:
    """Scores a student, and its teacher where there is one, at the masked positions of fixed windows.

    Args:
        input_ids: (N, L) int32, the held-out windows; rank r scores rows r, r + W, r + 2 W, ..., which may be none.
        window_ids: (N,) int64, for the masks.
        tokenizer: of the shards; the masking is train/evaluation/masking.py's.
        batch_size: sequences in one forward pass.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        window_ids: torch.Tensor,
        tokenizer: TokenizerInfo,
        *,
        batch_size: int,
        device: str,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        own = range(rank, len(input_ids), world_size)
        self._batches = [
            (input_ids[own[first : first + batch_size]], window_ids[own[first : first + batch_size]])
            for first in range(0, len(own), batch_size)
        ]
        self._masker = evaluation_masker(tokenizer, input_ids.shape[1])
        self._label = evaluation_label(input_ids.shape[1])
        self._device, self._world_size = device, world_size

    @torch.no_grad()
    def __call__(
        self,
        student: PreTrainedModel,
        teacher: Teacher | None = None,
        objective: DistillationLoss | None = None,
    ) -> dict[str, Any]:
        """Means over all held-out masked positions of all ranks; every rank calls this.

        Args:
            objective: of student and teacher; its relation term is scored as well, if it has one.
        Returns:
            heldout_mlm_loss (nats), heldout_accuracy; with a teacher also heldout_kl (nats, T = 1),
            heldout_top1_agreement, teacher_heldout_mlm_loss and teacher_heldout_accuracy (nats, shares); with the
            relation term heldout_relation (nats): of the text as it is, without masks, over all positions; the
            masking of the others under `LABEL`.
        """
        relations = objective is not None and objective.relations is not None
        was_training = student.training
        student.eval()
        total = torch.zeros(len(fields(HeldoutSums)), dtype=torch.float64, device=self._device)
        of_relations = torch.zeros(2, dtype=torch.float64, device=self._device)  # divergence, tokens
        for input_ids, window_ids in self._batches:
            masked = self._masker(input_ids.to(self._device), window_ids.to(self._device), HELDOUT_EPOCH)
            sums = heldout_statistics(student, masked, teacher(masked.input_ids) if teacher else None)
            values = [getattr(sums, field.name) for field in fields(HeldoutSums)]
            total += torch.stack([torch.zeros_like(total[0]) if v is None else v for v in values])
            if relations:
                assert objective is not None
                assert teacher is not None
                of_relations += _relation_sums(objective, student, teacher, input_ids.to(self._device).long())
        student.train(was_training)
        if self._world_size > 1:
            dist.all_reduce(total)
            if relations:
                dist.all_reduce(of_relations)
        sums_by_name = dict(zip((field.name for field in fields(HeldoutSums)), total.tolist(), strict=True))
        means = _means(sums_by_name, teacher is not None)
        if relations:
            divergence, num_tokens = of_relations.tolist()
            means["heldout_relation"] = divergence / max(1.0, num_tokens)
        return {**means, LABEL: self._label}


def _relation_sums(
    objective: DistillationLoss, student: PreTrainedModel, teacher: Teacher, input_ids: torch.Tensor
) -> torch.Tensor:
    """(2,) fp64: the relations' divergence summed over the tokens (B, L), and how many tokens there are."""
    family_of(student).encode(student, input_ids)
    weights = torch.ones(input_ids.shape, device=input_ids.device)
    divergence = objective.relation_term(teacher(input_ids), weights).double()
    return torch.stack([divergence, divergence.new_tensor(input_ids.numel())])


def _means(sums: dict[str, float], with_teacher: bool) -> dict[str, float]:
    count = max(1.0, sums["count"])
    names = {"heldout_mlm_loss": "student_loss", "heldout_accuracy": "student_correct"}
    if with_teacher:
        names |= {
            "heldout_kl": "kl",
            "heldout_top1_agreement": "agreement",
            "teacher_heldout_mlm_loss": "teacher_loss",
            "teacher_heldout_accuracy": "teacher_correct",
        }
    return {name: sums[source] / count for name, source in names.items()}
