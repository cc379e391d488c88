"""The five lines that a run ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from train.errors import UserError
from train.loop.closing_summary import closing_lines

SUMMARY: dict[str, Any] = {"loss": 6.25, "steps": 300, "tokens": 1_228_800, "tokens_per_s": 12345.6}
BEFORE = {"heldout_mlm_loss": 9.0, "teacher_heldout_mlm_loss": 5.5}
LAST = {"heldout_mlm_loss": 6.5, "heldout_top1_agreement": 0.412}


def test_a_distillation_ends_with_its_figures_and_the_next_command() -> None:
    summary = {**SUMMARY, "teacher": "t", "heldout_before": BEFORE, "heldout": LAST}
    lines = closing_lines(Path("runs/a"), Path("runs/a/model"), summary)
    assert lines == [
        "training loss  6.2500 after 300 steps, 1,228,800 tokens",
        "held-out loss  6.5000 nats a masked token (9.0000 before training, teacher 5.5000)",
        "agreement      41.2% of held-out masked tokens guessed as the teacher does",
        "speed          12,346 tokens/s (median)",
        "model          runs/a/model; beside its teacher: python launch/report.py runs/a --out runs/a/report",
    ]


def test_models_without_head_have_figures_of_their_own() -> None:
    before, last = (
        {"heldout_relation": 1.5, "heldout_cos": 0.25, "heldout_embedding": 0.75},
        {"heldout_relation": 0.5, "heldout_cos": 0.125, "heldout_embedding": 0.5},
    )
    summary = {**SUMMARY, "teacher": "t", "heldout_before": before, "heldout": last}
    assert closing_lines(Path("runs/a"), Path("runs/a/model"), summary)[1:3] == [
        "held-out loss  relations 0.5000 (1.5000 before), 1 - cos 0.1250 (0.2500 before), "
        "1 - cos of sentence vectors 0.5000 (0.7500 before)",
        "agreement      not measured: no term of the loss compares the guesses",
    ]


def test_a_run_without_teacher_or_held_out_windows() -> None:
    summary = {**SUMMARY, "loss": None, "teacher": None, "heldout_before": {}, "heldout": {}}
    lines = closing_lines(Path("runs/a"), Path("runs/a/model"), summary)
    assert lines[:3] == [
        "training loss  not logged after 300 steps, 1,228,800 tokens",
        "held-out loss  not measured: the shards hold no held-out windows",
        "agreement      no teacher",
    ]
    assert lines[4] == "model          runs/a/model; distil it with --model.teacher=runs/a/model"


@pytest.mark.parametrize(
    "damage",
    [{"heldout": None}, {"heldout": {"heldout_mlm_loss": None}}, {"steps": "many"}, {"tokens_per_s": []}],
)
def test_a_damaged_summary_is_named(damage: dict[str, Any]) -> None:
    whole = {**SUMMARY, "teacher": "t", "heldout_before": BEFORE, "heldout": LAST}
    for summary in ({**whole, **damage}, {"steps": 300}):
        with pytest.raises(
            UserError, match=r"runs/a/summary.json is damaged \(.*\); restore it, or give another"
        ):
            closing_lines(Path("runs/a"), Path("runs/a/model"), summary)
