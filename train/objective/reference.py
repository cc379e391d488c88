"""The objective as its formula is written, on full logits: the oracle of the tests and of the benchmark.

Slow and hungry on purpose: no chunk, no trick, gradients by autograd. `original_distiller_loss` is the
formula of the original code, step by step, for parity with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from train.config_sections.objective import ObjectiveConfig
from train.data.masking import MaskedBatch


@dataclass(frozen=True)
class ReferenceTerms:
    """Scalars in the dtype of the student's logits; all have gradients, save for the agreement."""

    kd: torch.Tensor
    mlm: torch.Tensor
    mse: torch.Tensor
    top1_agreement: torch.Tensor


def reference_terms(
    student_logits: torch.Tensor,
    teacher_logits: Sequence[torch.Tensor],
    shares: Sequence[float],
    masked: MaskedBatch,
    attention_mask: torch.Tensor | None = None,
    *,
    temperature: float,
    kd_positions: str = "all",
    num_tokens: float | None = None,
    num_masked_tokens: float | None = None,
) -> ReferenceTerms:
    """Terms of the objective on full logits, unweighted; see DistillationLoss.forward.

    Args:
        student_logits: (B, L, V).
        teacher_logits: one (B, L, V) per teacher; their tempered probabilities are averaged by `shares`.
        attention_mask: (B, L), non-zero where a token counts.
    """
    is_masked = torch.zeros_like(masked.input_ids, dtype=torch.bool)
    labels = torch.zeros_like(masked.input_ids)
    for row, column in masked.valid.nonzero():
        is_masked[row, masked.positions[row, column]] = True
        labels[row, masked.positions[row, column]] = masked.targets[row, column]
    kept = torch.ones_like(is_masked) if attention_mask is None else attention_mask != 0
    if kd_positions == "masked":
        kept = is_masked
    count = num_masked_tokens if kd_positions == "masked" else num_tokens
    student = student_logits[kept]
    teachers = [logits[kept].to(student.dtype) for logits in teacher_logits]
    kd = mse = agreement = student_logits.sum() * 0
    if teachers:
        weighted = list(zip(shares, teachers, strict=True))
        soft = sum(share * torch.softmax(logits / temperature, -1) for share, logits in weighted)
        assert isinstance(soft, torch.Tensor)
        log_student = torch.log_softmax(student / temperature, -1)
        kd = temperature**2 * _mean((torch.xlogy(soft, soft) - soft * log_student).sum(-1), count)
        mean_logits = sum(share * logits for share, logits in weighted)
        mse = _mean((student - mean_logits).square().sum(-1), count)
        best = soft.argmax(-1, keepdim=True)
        agreement = _mean((student.gather(-1, best).squeeze(-1) == student.amax(-1)).to(student.dtype), None)
    losses = -torch.log_softmax(student_logits[is_masked], -1).gather(-1, labels[is_masked][:, None])
    return ReferenceTerms(kd, _mean(losses, num_masked_tokens), mse, agreement.detach())


def reference_cosine(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    num_tokens: float | None = None,
) -> torch.Tensor:
    """1 - cos of (B, L, width) hidden states, mean over non-padding positions."""
    kept = slice(None) if attention_mask is None else attention_mask.flatten() != 0
    student, teacher = student_hidden.flatten(0, 1)[kept], teacher_hidden.flatten(0, 1)[kept]
    cosines = (student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1))
    return _mean(1 - cosines, num_tokens)


def reference_embeddings(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    pooling: str,
    attention_mask: torch.Tensor | None = None,
    num_tokens: float | None = None,
) -> torch.Tensor:
    """1 - cos of the pooled (B, L, width) hidden states, mean over non-padding positions of their sequence's value.

    Half the squared distance of the vectors at length 1 (Reimers and Gurevych 2020, arXiv:2004.09813, take that of the
    vectors as they are). Sequence by sequence, padding cut away.
    """
    values = []
    for index in range(student_hidden.shape[0]):
        kept = slice(None) if attention_mask is None else attention_mask[index] != 0
        student, teacher = (
            {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.max(0).values}[pooling]
            for hidden in (student_hidden[index][kept], teacher_hidden[index][kept].to(student_hidden.dtype))
        )
        distance = (student / student.norm() - teacher / teacher.norm()).square().sum() / 2
        values.append(distance.expand(student_hidden[index][kept].shape[0]))
    return _mean(torch.cat(values), num_tokens)


def reference_relations(
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    heads: int,
    attention_mask: torch.Tensor | None = None,
    num_tokens: float | None = None,
) -> torch.Tensor:
    """Divergence of the relations of (B, L, width) vectors, summed over their kinds (MiniLMv2, section 3).

    Mean over relation heads and non-padding positions. Sequence by sequence, padding cut away.
    """
    kinds = []
    for own, theirs in zip(student, teacher, strict=True):
        rows = []
        for index in range(own.shape[0]):
            kept = slice(None) if attention_mask is None else attention_mask[index] != 0
            log_student, log_teacher = (
                torch.log_softmax(parts @ parts.transpose(-1, -2) / parts.shape[-1] ** 0.5, -1)
                for parts in (
                    vectors[index][kept].unflatten(-1, (heads, -1)).transpose(0, 1)
                    for vectors in (own, theirs.to(own.dtype))
                )
            )
            rows.append((log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean(0))
        kinds.append(_mean(torch.cat(rows), num_tokens))
    return torch.stack(kinds).sum()


def _mean(values: torch.Tensor, count: float | None) -> torch.Tensor:
    """Sum over `count`, or over the number of values; 0 for none."""
    divisor = values.numel() if count is None else count
    return values.sum() / divisor if divisor else values.sum()


def original_distiller_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    settings: ObjectiveConfig,
) -> torch.Tensor:
    """The loss of `Distiller.step` in Hugging Face's research project distillation/distiller.py.

    Args:
        student_logits, teacher_logits: (B, L, V). student_hidden, teacher_hidden: (B, L, width), last layer.
        attention_mask: (B, L) bool. labels: (B, L) int64, -100 where nothing is asked.
        settings: its weights, T, and kd_positions=masked for its `restrict_ce_to_mask`.
    """
    temperature = settings.temperature
    vocabulary = student_logits.size(-1)
    kept = labels > -1 if settings.kd_positions == "masked" else attention_mask
    over_logits = kept.unsqueeze(-1).expand_as(student_logits)
    student = torch.masked_select(student_logits, over_logits).view(-1, vocabulary)
    teacher = torch.masked_select(teacher_logits, over_logits).view(-1, vocabulary)
    soft_targets = nn.functional.softmax(teacher / temperature, dim=-1)
    log_student = nn.functional.log_softmax(student / temperature, dim=-1)
    divergence = nn.KLDivLoss(reduction="batchmean")(log_student, soft_targets)
    loss = settings.kd_weight * divergence * temperature**2
    if settings.mlm_weight > 0:
        cross_entropy = nn.CrossEntropyLoss(ignore_index=-100)
        loss = loss + settings.mlm_weight * cross_entropy(
            student_logits.view(-1, vocabulary), labels.view(-1)
        )
    if settings.mse_weight > 0:
        loss = loss + settings.mse_weight * nn.MSELoss(reduction="sum")(student, teacher) / student.size(0)
    if settings.cosine_weight > 0:
        width = student_hidden.size(-1)
        over_hidden = attention_mask.unsqueeze(-1).expand_as(student_hidden)
        student_rows = torch.masked_select(student_hidden, over_hidden).view(-1, width)
        teacher_rows = torch.masked_select(teacher_hidden, over_hidden).view(-1, width)
        same = student_rows.new_ones(student_rows.size(0))
        cosine = nn.CosineEmbeddingLoss(reduction="mean")(student_rows, teacher_rows, same)
        loss = loss + settings.cosine_weight * cosine
    return loss
