"""Sentence vectors: the formulas of pooling, and the files of teachers that have others."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.unit.export.test_sentence_files import write_sentence_files
from train.errors import UserError
from train.models.pooling import pooled, sentence_pooling


def test_formulas_by_hand() -> None:
    """What padding holds does not enter, nor what a sequence without a token gives."""
    hidden = torch.tensor([[[1.0, -2.0], [3.0, -4.0], [math.nan, 9.0]]])
    mask = torch.tensor([[1, 1, 0]])
    for kind, wanted in (("mean", [[2.0, -3.0]]), ("max", [[3.0, -2.0]]), ("cls", [[1.0, -2.0]])):
        assert pooled(hidden, mask, kind).tolist() == wanted
        assert pooled(hidden[:, :2], None, kind).tolist() == wanted
        assert pooled(hidden.bfloat16(), mask, kind).dtype == torch.float32
    assert pooled(hidden, torch.zeros_like(mask), "mean").tolist() == [[0.0, 0.0]]


def test_of_a_teacher(tmp_path: Path) -> None:
    write_sentence_files(tmp_path)
    assert sentence_pooling(str(tmp_path)) == "mean"
    for settings, wanted in (
        ('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}', "cls"),
        ('{"pooling_mode": "max"}', "max"),
    ):
        (tmp_path / "1_Pooling/config.json").write_text(settings)
        assert sentence_pooling(str(tmp_path)) == wanted


def test_teachers_of_other_vectors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no 1_Pooling/config.json .*give a sentence-transformers model, or"):
        sentence_pooling(str(tmp_path))
    write_sentence_files(tmp_path, **{"3_Dense": "Dense"})
    with pytest.raises(
        UserError, match=r"has sentence-transformers' sentence_transformers.models.Dense, whose"
    ):
        sentence_pooling(str(tmp_path))
    write_sentence_files(tmp_path)
    (tmp_path / "1_Pooling/config.json").write_text(
        '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}'
    )
    with pytest.raises(
        UserError, match=r"pools by cls and mean \(1_Pooling/config.json\); give one that pools by"
    ):
        sentence_pooling(str(tmp_path))
