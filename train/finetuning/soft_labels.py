"""Soft labels: the outputs of fine-tuned teachers, and the loss that learns from them.

    L = a CE(true label) + (1 - a) T^2 KL(teachers' mean probabilities at T || student's at T)

(Hinton et al. 2015, arXiv:1503.02531; T = 2 and a = 0.5 as in DistilBERT's run_squad_w_distillation.py). A regression
has squared errors to the true and to the teachers' mean number in their places; where a text may have several classes,
each is a question of its own with two outcomes, and their terms are averaged. A text that nobody has labelled counts
with its soft label alone (Bucila et al. 2006: an ensemble labels, a small model learns).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    kl_div,
    log_softmax,
    logsigmoid,
    mse_loss,
)

from data_prep.shard_format.files import new_file, read_file
from train.errors import UserError
from train.finetuning.data.examples import NO_LABEL


def mean_soft_labels(logits: list[np.ndarray], temperature: float | None, many: bool = False) -> np.ndarray:
    """The teachers' tempered probabilities, averaged; of regressions the mean number.

    Args:
        logits: for each teacher (N, C) fp32.
        temperature: T > 0; None of a regression.
        many: a text may have several classes.
    Returns:
        (N, C) fp32; rows add up to 1 unless `many`, or of a regression.
    """
    if temperature is None:
        return np.stack(logits).mean(axis=0, dtype=np.float32)
    scaled = [torch.from_numpy(each).double() / temperature for each in logits]
    tempered = [torch.sigmoid(each) if many else torch.softmax(each, dim=-1) for each in scaled]
    return torch.stack(tempered).mean(dim=0).float().numpy()


def soft_label_loss(
    logits: torch.Tensor,
    soft_labels: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | None,
    hard_weight: float,
) -> torch.Tensor:
    """The loss above, averaged over the batch.

    Args:
        logits: (B, C) of the student.
        soft_labels: (B, C), see `mean_soft_labels`.
        labels: (B,) int64 classes, NO_LABEL where there is none; fp32 numbers, NaN where there is none; (B, C) zeros
            and ones where a text may have several classes, NaN where nobody has labelled it.
        temperature: T > 0; None of a regression.
        hard_weight: a, of the true labels.
    """
    if labels.dim() == 2:
        assert temperature is not None
        known = ~labels.isnan().any(dim=1)
        hard = binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none").mean(dim=1)
        student = logits / temperature
        yes = kl_div(logsigmoid(student), soft_labels, reduction="none")
        no = kl_div(logsigmoid(-student), 1 - soft_labels, reduction="none")
        soft = temperature**2 * (yes + no).mean(dim=1)
    elif logits.shape[1] == 1:
        known = ~labels.isnan()
        hard = mse_loss(logits[:, 0], labels.nan_to_num(), reduction="none")
        soft = mse_loss(logits[:, 0], soft_labels[:, 0], reduction="none")
    else:
        assert temperature is not None
        known = labels != NO_LABEL
        hard = cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="none")
        student = log_softmax(logits / temperature, dim=-1)
        soft = temperature**2 * kl_div(student, soft_labels, reduction="none").sum(dim=-1)
    weight = hard_weight * known.to(logits.dtype)
    return (weight * hard + (1 - weight) * soft).mean()


def distillation_loss(
    temperature: float | None, hard_weight: float
) -> Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]:
    """(model, batch with labels and soft_labels) -> `soft_label_loss`; no temperature for a regression.

    Where each word has a label, "labels" is (B, S), NO_LABEL where no word begins, and "soft_labels" has a row for each
    of the others.
    """

    def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        soft_labels, labels = batch.pop("soft_labels"), batch.pop("labels")
        logits = model(**batch).logits
        if logits.dim() == 3:
            of_words = labels != NO_LABEL
            logits, labels = logits[of_words], labels[of_words]
        return soft_label_loss(logits, soft_labels, labels, temperature, hard_weight)

    return loss


def class_order(name: str, config: Any, labels: tuple[str, ...] | None) -> list[int]:
    """For each class of the task, the teacher's column for it.

    A teacher whose config only says LABEL_0, LABEL_1 is taken to have the task's order.

    Raises:
        UserError: other labels, or another number of them.
    """
    own = [str(config.id2label[index]) for index in range(config.num_labels)]
    wanted = list(labels) if labels else None
    if wanted is not None and sorted(own) != sorted(wanted):
        own = [name.lower() for name in own]
    if len(own) != (len(wanted) if wanted else 1):
        expected = f"{len(wanted)} labels ({', '.join(wanted)})" if wanted else "one number, a regression"
        raise UserError(
            f"teacher {name} has {len(own)} labels ({', '.join(own)}), the task {expected}; give a teacher that was "
            "fine-tuned on this task"
        )
    if wanted is None or [name.lower() for name in own] == [f"label_{index}" for index in range(len(own))]:
        return list(range(len(own)))
    if sorted(own) != sorted(wanted):
        raise UserError(
            f"teacher {name} has the labels {', '.join(own)}, the task {', '.join(wanted)}; give a teacher that was "
            "fine-tuned on this task"
        )
    return [own.index(label) for label in wanted]


def teacher_outputs(
    folder: Path,
    teacher: str,
    contents: Sequence[str],
    shape: tuple[int, int],
    compute: Callable[[], np.ndarray],
) -> np.ndarray:
    """What a teacher says of the training set, fp32; kept in `folder`/soft-labels/ and read from there.

    Args:
        folder: OUT/TASK.
        contents: digests of all that the outputs depend on.
        shape: of the outputs; a file of another, or one that does not begin with the sha256 of its numbers, is
            written anew.
    Raises:
        UserError: some output is no number.
    """
    name = hashlib.sha256(chr(0).join(contents).encode()).hexdigest()[:32]
    path = folder / "soft-labels" / f"{name}.fp32"
    with contextlib.suppress(OSError, UserError):
        kept = read_file(path)
        numbers = memoryview(kept)[hashlib.sha256().digest_size :]
        if kept.startswith(hashlib.sha256(numbers).digest()) and len(numbers) == 4 * math.prod(shape):
            return np.frombuffer(numbers, "<f4").reshape(shape).copy()
    outputs = compute().astype("<f4", copy=False)
    if not np.isfinite(outputs).all():
        raise UserError(f"teacher {teacher}: its outputs are no numbers; give another")
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, binary=True) as file:
        content = outputs.tobytes()
        file.write(hashlib.sha256(content).digest() + content)
    return outputs


def weights_digest(name: str) -> str:
    """SHA-256 over a folder's config, tokenizer and weights; of a hub name, the name itself."""
    digest = hashlib.sha256(b"" if Path(name).is_dir() else name.encode())
    suffixes = (".safetensors", ".bin", ".json", ".txt", ".model")
    files = [path for path in Path(name).iterdir() if path.suffix in suffixes] if Path(name).is_dir() else []
    for path in sorted(files):
        if path.name == "scores.json":
            continue
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
