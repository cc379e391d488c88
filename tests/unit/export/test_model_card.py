"""The model card: teacher by name, recipe, data, scores, what the user states, and nothing of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.tiny_shards import write_tiny_shards
from tests.unit.checkpointing.test_checkpoint import make_checkpoint
from tests.unit.launch.test_reporting import scores, write_scores
from train.config import Config
from train.errors import UserError
from train.export.model_card import Stated, model_card, shown_name
from train.models.loading import load_masked_lm
from train.run_folder import as_tree

SUMMARY = {
    "teacher": "google-bert/bert-base-uncased",
    "tokens": 1234567,
    "heldout": {"heldout_mlm_loss": 2.5, "heldout_masking": "words"},
    "versions": {"torch": "2.13"},
}


def test_a_whole_card(teacher_folder: str, tmp_path: Path) -> None:
    run = tmp_path / "secret" / "run"
    checkpoint = make_checkpoint(run / "checkpoints", 5)
    write_tiny_shards(tmp_path / "secret" / "shards")
    tree = as_tree(Config())
    tree["data"]["shards"] = str(tmp_path / "secret" / "shards")
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    stated = Stated(
        name="me/small",
        license="apache-2.0",
        languages=("en",),
        data_license="CC BY-SA 4.0",
        scores=write_scores(tmp_path / "scores", sst2=scores("sst2", 90.0)),
    )
    card = model_card(load_masked_lm(teacher_folder), checkpoint, SUMMARY, stated=stated)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "license": "apache-2.0",
        "language": ["en"],
        "base_model": ["google-bert/bert-base-uncased"],
        "tags": ["halfling", "distillation"],
    }
    for line in (
        'fill_mask = pipeline("fill-mask", model="me/small")',
        "| kd weight | 5.0 |",
        "| optimizer | lamb, learning rate ",
        "Licence of the data: CC BY-SA 4.0.",
        "| tokens trained on | 1,234,567 |",
        "| heldout_mlm_loss | 2.5000 |",
        "| sst2 | 90.0 (median of 3) |",
        "Licence of the weights: apache-2.0",
        "howpublished = {me/small}",
        "arXiv:1910.01108",
        "tokens to train on.",
    ):
        assert line in body, line
    assert "distilled from google-bert/bert-base-uncased, with Halfling for 5 steps" in body
    assert "secret" not in card


def test_what_is_not_stated_is_said_so(teacher_folder: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoints", 5)
    card = model_card(load_masked_lm(teacher_folder), checkpoint, None)
    assert "trained without a teacher" in card
    assert "Licence of the data: not stated." in card
    assert "Language: not stated." in card
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no TASK/scores.json in it"):
        model_card(load_masked_lm(teacher_folder), checkpoint, None, stated=Stated(scores=tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("google-bert/bert-base-uncased", "google-bert/bert-base-uncased"),
        ("/home/me/runs/teacher/model", "teacher"),
        ("runs/quickstart/teacher/model/", "teacher"),
        ("../encoder", "encoder"),
    ],
)
def test_names_are_shown_without_the_machine_s_folders(name: str, shown: str) -> None:
    assert shown_name(name) == shown
