"""Held-out scores: the same windows and the same masks at every evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from data_prep.shard_format.tokenizer_info import TokenizerInfo
from train.evaluation.masking import LABEL, evaluation_label, evaluation_masker
from train.evaluation.scores import SCORES_BESIDE_TEACHER, STUDENT_SCORES, heldout_statistics
from train.models.families import has_head
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
        batch_done: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Means over all held-out masked positions of all ranks; every rank calls this.

        Args:
            objective: of student and teacher; where it has a relation or embedding term, or predicts no tokens, its
                terms that read no logits are scored as well.
            batch_done: called after each batch.
        Returns:
            Of a student with an MLM head heldout_mlm_loss (nats), heldout_accuracy, and the masking under `LABEL`;
            with a teacher that has one too also heldout_kl (nats, T = 1), heldout_top1_agreement,
            teacher_heldout_mlm_loss and teacher_heldout_accuracy (nats, shares); of the objective heldout_relation
            (nats), heldout_cos, heldout_layer_cos and heldout_embedding: of the text as it is, without masks, over all
            positions.
        """
        was_training = student.training
        student.eval()
        scores = self._scores_of_tokens(student, teacher, batch_done) if has_head(student) else {}
        if teacher is not None and objective is not None:
            settings = objective.settings
            if settings.relation_weight + settings.embedding_weight > 0 or not settings.needs_masks:
                scores |= self._scores_of_text(student, teacher, objective, batch_done)
        student.train(was_training)
        return scores

    def _scores_of_tokens(
        self, student: PreTrainedModel, teacher: Teacher | None, batch_done: Callable[[], None]
    ) -> dict[str, Any]:
        if teacher is not None and not teacher.has_head:
            teacher = None
        names = STUDENT_SCORES if teacher is None else SCORES_BESIDE_TEACHER
        total = torch.zeros(1 + len(names), dtype=torch.float64, device=self._device)
        for input_ids, window_ids in self._batches:
            masked = self._masker(input_ids.to(self._device), window_ids.to(self._device), HELDOUT_EPOCH)
            taught = None if teacher is None else teacher(masked.input_ids, whole=True)
            total += heldout_statistics(student, masked, taught)
            batch_done()
        if self._world_size > 1:
            dist.all_reduce(total)
        count, *sums = total.tolist()
        means = [each / max(1.0, count) for each in sums]
        return {**dict(zip(names, means, strict=True)), LABEL: self._label}

    def _scores_of_text(
        self,
        student: PreTrainedModel,
        teacher: Teacher,
        objective: DistillationLoss,
        batch_done: Callable[[], None],
    ) -> dict[str, Any]:
        weights = objective.settings.term_weights()
        names = [
            name for name in ("cos", "layer_cos", "relation", "embedding") if weights[f"loss_{name}"] > 0
        ]
        sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=self._device)  # terms, tokens
        for input_ids, _ in self._batches:
            text = input_ids.to(self._device).long()
            terms = objective.score_text(student, teacher(text), text)
            values = [terms[f"loss_{name}"].double() for name in names]
            sums += torch.stack([*values, sums.new_tensor(text.numel())])
            batch_done()
        if self._world_size > 1:
            dist.all_reduce(sums)
        *totals, num_tokens = sums.tolist()
        return {f"heldout_{name}": total / num_tokens for name, total in zip(names, totals, strict=True)}
