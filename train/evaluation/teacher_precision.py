"""Is a teacher in half precision still the teacher? Asked of one batch, before days of training."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from train.errors import UserError
from train.models.families import DecoderInputs, Family, has_head
from train.models.teacher import Teacher
from train.objective.chunk_terms import Workspace, tempered_logits
from train.objective.fused_loss import chunk_rows
from train.objective.hidden_loss import hidden_cosine

LARGEST_COSINE = 0.01
"""1 - cos of a token's last hidden states, where there is no head. fp16 is below 1e-5 and bf16 below 1e-3."""
LARGEST_KL = 0.05
"""Nats per token. fp16 is below 1e-4 on a sound BERT and bf16 below 1e-2; a broken one is far above."""


@dataclass(frozen=True)
class PrecisionReport:
    """How far a teacher in its running precision is from itself in fp32, on one batch."""

    name: str
    dtype: str
    kl: float | None = None
    """Mean KL(fp32 || running precision) at T = 1, nats per token; 0 for a teacher that runs in fp32."""
    top1_agreement: float | None = None
    """Share of tokens with the same first choice."""
    cosine: float | None = None
    """Mean 1 - cos of the last hidden states; of a model without a head, which has no logits."""

    def __str__(self) -> str:
        if self.kl is None:
            return f"no MLM head; {self.dtype} against fp32: 1 - cos {self.cosine:.1e}"
        same = f"same choice {self.top1_agreement:.0%}"
        return f"has its MLM head; {self.dtype} against fp32: KL {self.kl:.1e}, {same}"


def check_teacher_precision(
    teacher: Teacher, originals: Sequence[PreTrainedModel], input_ids: torch.Tensor
) -> tuple[PrecisionReport, ...]:
    """Compare every member with itself in fp32 on one batch.

    Args:
        originals: the members as they were loaded, in fp32; moved to the teacher's device one after the other.
        input_ids: (B, L) int64 on the teacher's device.
    Raises:
        UserError: overflow or NaN, or outputs that have little to do with the fp32 model's.
    """
    return tuple(
        _compare(name, family, model, _on_device(original, model), input_ids)
        for name, family, model, original in zip(
            teacher.names, teacher.families, teacher.models, originals, strict=True
        )
    )


def _on_device(original: PreTrainedModel, running: PreTrainedModel) -> PreTrainedModel:
    """A copy, because the original makes the student, on the CPU."""
    if original.device == running.device:
        return original.eval()
    reference: Any = copy.deepcopy(original)
    return reference.to(running.device).eval()  # type: ignore[no-any-return]


@torch.inference_mode()
def _compare(
    name: str,
    family: Family,
    model: PreTrainedModel,
    reference: PreTrainedModel,
    input_ids: torch.Tensor,
) -> PrecisionReport:
    dtype = str(model.dtype).removeprefix("torch.")
    remedy = "set model.teacher_dtype to bf16 or fp32" if dtype != "float32" else "check it"
    if not has_head(model):
        return _compare_hidden(name, family, model, reference, input_ids, remedy)
    running, exact = (
        family.decoder_inputs(each, family.encode(each, input_ids).last_hidden.flatten(0, 1))
        for each in (model, reference)
    )
    tokens = input_ids.numel()
    workspace, size = Workspace(), chunk_rows(tokens, exact.weight)
    sums = torch.zeros(2, dtype=torch.float64, device=input_ids.device)
    largest = torch.zeros((), device=input_ids.device)
    for start in range(0, tokens, size):
        chunk = slice(start, start + size)
        logits = _logits(running, chunk, workspace, "running")
        expected = _logits(exact, chunk, workspace, "reference")
        # amax carries a NaN along; so does maximum.
        largest = torch.maximum(largest, logits.abs().amax())
        # In fp64, because fp32's own rounding is as large as what a sound fp16 teacher shows.
        log_running, log_expected = (torch.log_softmax(each.double(), -1) for each in (logits, expected))
        divergence = (log_expected.exp() * (log_expected - log_running)).sum(-1)
        same = logits.argmax(-1) == expected.argmax(-1)
        sums += torch.stack([divergence, same.double()], -1).sum(0)
    kl, agreement = (sums / tokens).tolist()
    if not torch.isfinite(largest) or not torch.isfinite(sums).all():
        raise UserError(f"teacher {name} gives infinite or NaN logits in {dtype}: {remedy}")
    if kl > LARGEST_KL:
        raise UserError(
            f"teacher {name} in {dtype} is not the model it is in float32: KL {kl:.3g} nats per token, "
            f"{agreement:.0%} of first choices the same: {remedy}"
        )
    return PrecisionReport(name, dtype, kl, agreement)


def _compare_hidden(
    name: str,
    family: Family,
    model: PreTrainedModel,
    reference: PreTrainedModel,
    input_ids: torch.Tensor,
    remedy: str,
) -> PrecisionReport:
    dtype = str(model.dtype).removeprefix("torch.")
    running, exact = (
        family.encode(each, input_ids).last_hidden.flatten(0, 1).double() for each in (model, reference)
    )
    weights = running.new_full(running.shape[:1], 1 / len(running))
    cosine = float(hidden_cosine(running, exact, weights))
    if not torch.isfinite(running).all() or not torch.isfinite(exact).all():
        raise UserError(f"teacher {name} gives infinite or NaN hidden states in {dtype}: {remedy}")
    if cosine > LARGEST_COSINE:
        raise UserError(
            f"teacher {name} in {dtype} is not the model it is in float32: its hidden states differ by "
            f"{cosine:.3g} (1 - cos): {remedy}"
        )
    return PrecisionReport(name, dtype, cosine=max(0.0, cosine))


def _logits(inputs: DecoderInputs, chunk: slice, workspace: Workspace, name: str) -> torch.Tensor:
    part = inputs.of(chunk).in_dtype(torch.float32)
    return tempered_logits(part, 1.0, workspace.get(name, part.features.shape[0], part.weight, torch.float32))
