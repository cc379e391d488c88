"""What fine-tuned teachers say of texts, and the loss that learns from it.

    L = a CE(true label) + (1 - a) T^2 KL(teachers' mean probabilities at T || student's at T)

(Hinton et al. 2015, arXiv:1503.02531; T = 2 and a = 0.5 as in DistilBERT's run_squad_w_distillation.py). A regression
has squared errors to the true and to the teachers' mean number in their places. A text that nobody has labelled counts
with its soft label alone (Bucila et al. 2006: an ensemble labels, a small model learns).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss

from train.errors import UserError
from train.finetuning.examples import NO_LABEL


def mean_soft_labels(logits: list[np.ndarray], temperature: float | None) -> np.ndarray:
    """The teachers' tempered probabilities, averaged; of regressions the mean number.

    Args:
        logits: for each teacher (N, C) fp32; C = 1 is a regression.
    Returns:
        (N, C) fp32; rows add up to 1 unless C = 1.
    """
    if logits[0].shape[1] == 1:
        return np.stack(logits).mean(axis=0, dtype=np.float32)
    assert temperature is not None
    tempered = [torch.softmax(torch.from_numpy(each).double() / temperature, dim=-1) for each in logits]
    return torch.stack(tempered).mean(dim=0).float().numpy()


def soft_label_loss(
    logits: torch.Tensor,
    soft_labels: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    hard_weight: float,
) -> torch.Tensor:
    """The loss above, averaged over the batch.

    Args:
        logits: (B, C) of the student; C = 1 is a regression.
        soft_labels: (B, C), see `mean_soft_labels`.
        labels: (B,) int64 classes, NO_LABEL where there is none; fp32 numbers, NaN where there is none.
        temperature: T > 0; without effect on a regression.
        hard_weight: a, of the true labels.
    """
    if logits.shape[1] == 1:
        known = ~labels.isnan()
        hard = mse_loss(logits[:, 0], labels.nan_to_num(), reduction="none")
        soft = mse_loss(logits[:, 0], soft_labels[:, 0], reduction="none")
    else:
        known = labels != NO_LABEL
        hard = cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="none")
        student = log_softmax(logits / temperature, dim=-1)
        soft = temperature**2 * kl_div(student, soft_labels, reduction="none").sum(dim=-1)
    weight = hard_weight * known.to(logits.dtype)
    return (weight * hard + (1 - weight) * soft).mean()


class SoftLabelLoss:
    """`soft_label_loss` as train/finetuning/training.py takes it."""

    def __init__(self, temperature: float | None, hard_weight: float) -> None:
        self._temperature, self._hard_weight = temperature or 1.0, hard_weight

    def __call__(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        soft_labels, labels = batch.pop("soft_labels"), batch.pop("labels")
        logits = model(**batch).logits
        return soft_label_loss(logits, soft_labels, labels, self._temperature, self._hard_weight)


def class_order(name: str, config: Any, labels: tuple[str, ...] | None) -> list[int]:
    """For each class of the task, the teacher's column for it.

    A teacher whose config only says LABEL_0, LABEL_1 is taken to have the task's order.

    Raises:
        UserError: other labels, or another number of them.
    """
    own = [str(config.id2label[index]).lower() for index in range(config.num_labels)]
    wanted = list(labels) if labels else None
    if len(own) != (len(wanted) if wanted else 1):
        expected = f"{len(wanted)} labels ({', '.join(wanted)})" if wanted else "one number, a regression"
        raise UserError(
            f"teacher {name} has {len(own)} labels ({', '.join(own)}), the task {expected}; give a teacher that was "
            "fine-tuned on this task"
        )
    if wanted is None or own == [f"label_{index}" for index in range(len(own))]:
        return list(range(len(own)))
    if sorted(own) != sorted(wanted):
        raise UserError(
            f"teacher {name} has the labels {', '.join(own)}, the task {', '.join(wanted)}; give a teacher that was "
            "fine-tuned on this task"
        )
    return [own.index(label) for label in wanted]


def cached_logits(folder: Path, *contents: str) -> Path:
    """The file for logits that depend on nothing but `contents` (digests of the teacher, of the texts, the length)."""
    return folder / "soft-labels" / f"{hashlib.sha256(chr(0).join(contents).encode()).hexdigest()[:32]}.npy"


def read_logits(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """(N, C) fp32, or None where there is no such file, or one that is not whole."""
    try:
        logits = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return logits if logits.shape == shape else None


def write_logits(path: Path, logits: np.ndarray) -> None:
    """Write them whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    with partial.open("wb") as file:
        np.save(file, logits, allow_pickle=False)
    partial.rename(path)
