"""Which checkpoint is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.checkpointing.test_checkpoint import change, make_checkpoint
from train.errors import UserError
from train.export.hugging_face import find_checkpoint
from train.export.model_card import model_card
from train.models.loading import load_masked_lm


def test_the_step_before_a_damaged_one_is_exported_aloud(tmp_path: Path) -> None:
    older, newer = make_checkpoint(tmp_path / "checkpoints", 5), make_checkpoint(tmp_path / "checkpoints", 10)
    assert find_checkpoint(tmp_path, pytest.fail) == newer
    change(newer / "mp_rank_00_model_states.pt", lambda content: content[:-1] + b"x")
    said: list[str] = []
    assert find_checkpoint(tmp_path, said.append) == older
    assert len(said) == 1
    assert f"{newer} is passed over: mp_rank_00_model_states.pt is damaged" in said[0]
    with pytest.raises(
        UserError, match=r"step-00000010 is not whole: mp_rank_00_model_states.pt is damaged .*export another"
    ):
        find_checkpoint(newer, pytest.fail)
    change(older / "mp_rank_00_model_states.pt", lambda content: content[1:])
    with pytest.raises(
        UserError, match=r"neither a run folder nor a complete checkpoint; .*00000010.*; .*00000005.*"
    ):
        find_checkpoint(tmp_path, pytest.fail)


@pytest.mark.parametrize(
    "damage", [{"tokens": "many"}, {"heldout": [1]}, {"versions": None}, {"teacher": {}}]
)
def test_a_damaged_summary_is_named(damage: dict[str, Any], teacher_folder: str, tmp_path: Path) -> None:
    checkpoint, model = make_checkpoint(tmp_path / "checkpoints", 5), load_masked_lm(teacher_folder)
    summary = {"teacher": "t", "tokens": 7, "heldout": {"heldout_kl": 0.5}, "versions": {"torch": "2"}}
    card = model_card(model, checkpoint, summary)
    assert "| heldout_kl | 0.5000 |" in card
    assert "for 5 steps of LAMB." in card
    with pytest.raises(
        UserError, match=rf"{tmp_path}/summary.json is damaged .*{next(iter(damage))}.*; restore it"
    ):
        model_card(model, checkpoint, {**summary, **damage})
