"""Is a teacher in half precision still the teacher? One batch tells, before days of training."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from train.errors import UserError
from train.models.families import Family
from train.models.loading import load_masked_lm
from train.models.teacher import Teacher
from train.objective.chunk_terms import DecoderRows, Workspace, tempered_logits
from train.objective.fused_loss import chunk_rows

LARGEST_KL = 0.05
"""Nats per token. fp16 is below 1e-4 on a sound BERT and bf16 below 1e-2; a broken one is far above."""


@dataclass(frozen=True)
class PrecisionReport:
    """How far a teacher in its running precision is from itself in fp32, on one batch."""

    name: str
    dtype: str
    kl: float
    """Mean KL(fp32 || running precision) at T = 1, nats per token; 0 for a teacher that runs in fp32."""
    top1_agreement: float
    """Share of tokens with the same first choice."""


def check_teacher_precision(teacher: Teacher, input_ids: torch.Tensor) -> tuple[PrecisionReport, ...]:
    """Compare every member with an fp32 copy of itself on one batch.

    Args:
        input_ids: (B, L) int64 on the teacher's device.
    Raises:
        UserError: overflow or NaN, or outputs that have little to do with the fp32 model's.
    """
    reports = []
    for name, source, family, model in zip(
        teacher.names, teacher.sources, teacher.families, teacher.models, strict=True
    ):
        half = model.dtype in (torch.float16, torch.bfloat16)
        reference = _in_fp32(source, model) if half else model
        reports.append(_compare(name, family, model, reference, input_ids))
    return tuple(reports)


def _in_fp32(source: str | None, model: PreTrainedModel) -> PreTrainedModel:
    """From the checkpoint if there is one, because a copy would hold the rounded weights."""
    reference: Any = load_masked_lm(source) if source is not None else copy.deepcopy(model).float()
    return reference.to(model.device).eval()


@torch.inference_mode()
def _compare(
    name: str,
    family: Family,
    model: PreTrainedModel,
    reference: PreTrainedModel,
    input_ids: torch.Tensor,
) -> PrecisionReport:
    dtype = str(model.dtype).removeprefix("torch.")
    rows, reference_rows = (_rows(family, each, input_ids) for each in (model, reference))
    tokens = input_ids.numel()
    workspace, size = Workspace(), chunk_rows(tokens, reference_rows.weight)
    sums = torch.zeros(2, dtype=torch.float64, device=input_ids.device)
    largest = torch.zeros((), device=input_ids.device)
    for start in range(0, tokens, size):
        chunk = slice(start, start + size)
        logits = _logits(rows, chunk, workspace, "running")
        expected = _logits(reference_rows, chunk, workspace, "reference")
        # amax carries a NaN along; so does maximum.
        largest = torch.maximum(largest, logits.abs().amax())
        # In fp64, because fp32's own rounding is as large as what a sound fp16 teacher shows.
        log_running, log_expected = (torch.log_softmax(each.double(), -1) for each in (logits, expected))
        divergence = (log_expected.exp() * (log_expected - log_running)).sum(-1)
        same = logits.argmax(-1) == expected.argmax(-1)
        sums += torch.stack([divergence, same.double()], -1).sum(0)
    kl, agreement = (sums / tokens).tolist()
    remedy = "set model.teacher_dtype to bf16 or fp32" if dtype != "float32" else "check it"
    if not torch.isfinite(largest) or not torch.isfinite(sums).all():
        raise UserError(f"teacher {name} gives infinite or NaN logits in {dtype}: {remedy}")
    if kl > LARGEST_KL:
        raise UserError(
            f"teacher {name} in {dtype} is not the model it is in float32: KL {kl:.3g} nats per token, "
            f"{agreement:.0%} of first choices the same: {remedy}"
        )
    return PrecisionReport(name, dtype, kl, agreement)


def _rows(family: Family, model: PreTrainedModel, input_ids: torch.Tensor) -> DecoderRows:
    hidden = family.encode(model, input_ids).last_hidden
    return DecoderRows(family.transform(model, hidden.flatten(0, 1)), *family.decoder(model))


def _logits(rows: DecoderRows, chunk: slice, workspace: Workspace, name: str) -> torch.Tensor:
    part = DecoderRows(rows.features[chunk], rows.weight, rows.bias).in_dtype(torch.float32)
    return tempered_logits(part, 1.0, workspace.get(name, part.features.shape[0], part.weight, torch.float32))
