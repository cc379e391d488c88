"""A fine-tuned teacher's answers as soft labels: distributions over the tokens where an answer starts and ends.

DistilBERT (D) of the paper (Sanh et al. 2019, section 4) learns SQuAD from them, with the loss of the authors'
run_squad_w_distillation.py:

    L = a CE + (1 - a) T^2 KL(softmax(z_t / T) || softmax(z_s / T)),   a = 1/2, T = 2

each term the mean of start's and end's, KL summed over a window's tokens and averaged over windows. Padding has no part
in KL here, so that it does not depend on what else is in the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from train.finetuning.squad.features import Floats, Windows


def soft_span_loss(
    logits: torch.Tensor, soft: torch.Tensor, mask: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """T^2 KL(teacher || student) over a window's tokens, averaged over windows and start and end.

    Args:
        logits: (windows, 2, tokens) the student's, for start and end.
        soft: same shape, the teachers' probabilities at `temperature`; 0 at padding.
        mask: (windows, tokens) true where a token is no padding; None without padding.
    Returns:
        Scalar, nats.
    """
    scaled = logits.float() / temperature
    if mask is not None:
        scaled = scaled.masked_fill(~mask.bool()[:, None, :], float("-inf"))
    log_student = functional.log_softmax(scaled, dim=-1)
    if mask is not None:
        log_student = log_student.masked_fill(~mask.bool()[:, None, :], 0.0)
    divergence = functional.kl_div(log_student, soft, reduction="none").sum(-1)  # (windows, 2)
    return temperature**2 * divergence.mean()


def distillation_loss(
    hard_weight: float, temperature: float
) -> Callable[[Any, dict[str, Any]], torch.Tensor]:
    """(model, batch with soft_spans) -> hard_weight CE + (1 - hard_weight) T^2 KL."""

    def loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        outputs = model(**{name: value for name, value in batch.items() if name != "soft_spans"})
        logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=1)
        soft = soft_span_loss(logits, batch["soft_spans"], batch.get("attention_mask"), temperature)
        return hard_weight * outputs.loss + (1.0 - hard_weight) * soft

    return loss


def tempered(logits: Floats, windows: Windows, temperature: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Softmax at `temperature` within each window, of (2, tokens of all windows) logits of start and end."""
    scaled = logits.astype(np.float64) / temperature
    begins = windows.bounds[:-1]
    scaled -= np.repeat(np.maximum.reduceat(scaled, begins, axis=1), windows.lengths, axis=1)
    weights = np.exp(scaled)
    total = np.repeat(np.add.reduceat(weights, begins, axis=1), windows.lengths, axis=1)
    return weights / total


def soft_spans(logits: Sequence[Floats], windows: Windows, temperature: float) -> Floats:
    """The teachers' mean probabilities, of logits (2, tokens of all windows) each, in the same shape."""
    mean = np.zeros_like(logits[0], np.float64)
    for each in logits:
        mean += tempered(each, windows, temperature) / len(logits)
    return mean.astype(np.float32)


def windows_digest(windows: Windows) -> str:
    """SHA-256 over what a teacher reads."""
    return hashlib.sha256(windows.input_ids.tobytes() + windows.bounds.tobytes()).hexdigest()
