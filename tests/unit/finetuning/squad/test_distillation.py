"""The loss with soft starts and ends, against the formula as run_squad_w_distillation.py writes it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div, log_softmax, softmax

from tests.unit.finetuning.squad_tokenizers import wordpiece
from train.finetuning.squad.distillation import (
    distillation_loss,
    soft_span_loss,
    soft_spans,
    tempered,
    windows_digest,
)
from train.finetuning.squad.features import Windows, make_windows
from train.finetuning.squad.questions import Question


def original(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Without padding, as Hugging Face's script: the mean of two batchmean KLs times T^2."""
    terms = [
        kl_div(
            log_softmax(student[:, which] / temperature, dim=-1),
            softmax(teacher[:, which] / temperature, dim=-1),
            reduction="batchmean",
        )
        * temperature**2
        for which in (0, 1)
    ]
    return (terms[0] + terms[1]) / 2.0


def test_the_loss_is_the_scripts() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 2, 7, generator=generator) for _ in range(2))
    soft = softmax(teacher / 2.0, dim=-1)
    torch.testing.assert_close(
        soft_span_loss(student, soft, None, 2.0), original(student, teacher, 2.0), rtol=1e-5, atol=1e-6
    )
    assert float(soft_span_loss(teacher, soft, None, 2.0)) == pytest.approx(0.0, abs=1e-6)


def test_by_hand() -> None:
    # Teacher (3/4, 1/4), student (1/2, 1/2) at T = 1, for start; end agrees.
    logits = torch.zeros(1, 2, 2)
    soft = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]])
    expected = 0.5 * (0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert float(soft_span_loss(logits, soft, None, 1.0)) == pytest.approx(expected)


def test_padding_has_no_part() -> None:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(2, 2, 6, generator=generator).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    soft = softmax(torch.randn(2, 2, 6, generator=generator).masked_fill(~mask.bool()[:, None], -1e9), dim=-1)
    alone = [
        soft_span_loss(student[row : row + 1, :, :length], soft[row : row + 1, :, :length], None, 2.0)
        for row, length in ((0, 4), (1, 6))
    ]
    together = soft_span_loss(student, soft, mask, 2.0)
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2)
    together.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert (student.grad[0, :, 4:] == 0).all()


def test_hard_and_soft_are_mixed() -> None:
    logits = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(2))

    def model(**batch: Any) -> SimpleNamespace:
        assert "soft_spans" not in batch
        return SimpleNamespace(loss=torch.tensor(3.0), start_logits=logits[:, 0], end_logits=logits[:, 1])

    soft = softmax(torch.zeros(2, 2, 5), dim=-1)
    batch = {"input_ids": torch.zeros(2, 5), "soft_spans": soft}
    kl = soft_span_loss(logits, soft, None, 2.0)
    torch.testing.assert_close(distillation_loss(0.25, 2.0)(model, batch), 0.25 * 3.0 + 0.75 * kl)


@pytest.fixture
def windows() -> Windows:
    questions = [Question(key, "what?", "the model reads " * 9, (), ()) for key in ("a", "b")]
    return make_windows(questions, wordpiece(), 24, 10)


def test_ensembles_average_tempered_probabilities(windows: Windows) -> None:
    rng = np.random.default_rng(0)
    shape = (2, len(windows.input_ids))
    teachers = [(30.0 * rng.normal(size=shape)).astype(np.float32) for _ in range(3)]
    found = soft_spans(teachers, windows, 2.0)
    assert found.shape == shape
    assert found.dtype == np.float32
    for begin, end in zip(windows.bounds[:-1], windows.bounds[1:], strict=True):
        parts = [
            torch.softmax(torch.from_numpy(logits[:, begin:end]).double() / 2.0, dim=-1)
            for logits in teachers
        ]
        np.testing.assert_allclose(found[:, begin:end], torch.stack(parts).mean(0), rtol=1e-6, atol=1e-9)
    one = tempered(teachers[0], windows, 2.0)
    np.testing.assert_allclose(np.add.reduceat(one, windows.bounds[:-1], axis=1), 1.0, rtol=1e-12)


def test_a_cache_of_other_windows_is_another(windows: Windows) -> None:
    other = make_windows([Question("a", "why?", "the model reads", (), ())], wordpiece(), 24, 10)
    copied = replace(windows, input_ids=windows.input_ids.copy(), bounds=windows.bounds.copy())
    assert windows_digest(windows) == windows_digest(copied)
    assert windows_digest(windows) != windows_digest(other)
    same_shape = replace(windows, input_ids=windows.input_ids[::-1].copy())
    assert windows_digest(windows) != windows_digest(same_shape)
