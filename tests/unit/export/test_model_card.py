"""The model card: teacher by name, recipe, data, scores, what the user states, and nothing of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny_shards import write_tiny_shards
from tests.unit.checkpointing.test_checkpoint import make_checkpoint
from tests.unit.launch.reporting.given import scores, write_scores
from train.config import Config
from train.errors import UserError
from train.export.model_card import Stated, _source, model_card, shown_name
from train.models.loading import load_masked_lm
from train.run_folder import as_tree

SUMMARY = {
    "teacher": "google-bert/bert-base-uncased",
    "hub_names": ["google-bert/bert-base-uncased"],
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
        "| layers of the teacher | distilbert |",
        "| temperature | 2.0 |",
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
    assert "mse weight" not in card


def card_of(run: Path, teacher_folder: str, summary: dict[str, Any], **sections: dict[str, Any]) -> str:
    """The card of a run whose configuration has these values."""
    checkpoint, tree = make_checkpoint(run / "checkpoints", 5), as_tree(Config())
    for name, values in sections.items():
        tree[name] |= values
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    return model_card(load_masked_lm(teacher_folder), checkpoint, summary)


def test_a_model_without_a_teacher(teacher_folder: str, tmp_path: Path) -> None:
    name = "google-bert/bert-base-uncased"
    card = card_of(
        tmp_path,
        teacher_folder,
        {**SUMMARY, "teacher": None},
        model={"teacher": None, "start_from": name},
        objective={"kd_weight": 0.0, "cosine_weight": 0.0},
    )
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == [name]
    assert f"| begun from | {name} |" in card
    for absent in ("layers of the teacher", "temperature", "kd weight", "cosine weight"):
        assert absent not in card, absent
    assert "| mlm weight | 2.0 |" in card


def test_scores_of_the_runs_end_are_not_those_of_an_older_checkpoint(
    teacher_folder: str, tmp_path: Path
) -> None:
    model = load_masked_lm(teacher_folder)
    for step, said in ((5, True), (3, False)):
        checkpoint = make_checkpoint(tmp_path / "run" / "checkpoints", step)
        card = model_card(model, checkpoint, {**SUMMARY, "steps": 5})
        assert ("1,234,567" in card) is said
        assert ("heldout_mlm_loss" in card or "MLM loss" in card) is said


def test_a_folder_that_holds_no_tasks_scores_is_named(teacher_folder: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "run" / "checkpoints", 5)
    folder = write_scores(tmp_path / "scores", sst2=scores("sst2", 90.0))
    for given, said in (
        (folder / "sst2", rf"that is the folder of one task; give {folder}, which holds it"),
        (tmp_path / "none", r"none: no such folder"),
    ):
        with pytest.raises(UserError, match=said):
            model_card(load_masked_lm(teacher_folder), checkpoint, SUMMARY, stated=Stated(scores=given))


@pytest.mark.parametrize("recorded", [{"hub_names": []}, {}])
def test_a_folder_that_is_gone_is_no_name_on_the_hub(
    teacher_folder: str, tmp_path: Path, recorded: dict[str, Any]
) -> None:
    summary = {name: value for name, value in SUMMARY.items() if name != "hub_names"}
    summary |= {"teacher": "models/mybert", **recorded}
    card = card_of(tmp_path, teacher_folder, summary, model={"teacher": "models/mybert"})
    assert "base_model" not in card
    assert "distilled from mybert, " in card


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("hub:a/b:c", "hub:a/b:c"),
        ("texts/", "texts"),
        ("line:x/a.txt", "a.txt"),
        (".", "here"),
        ("line:..", "above"),
    ],
)
def test_a_source_has_a_name(
    source: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "above/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above/here")
    assert _source({"source": source}) == shown


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
        ("models/mybert", "mybert"),
        ("/home/me/runs/teacher/model", "teacher"),
        ("runs/quickstart/teacher/model/", "teacher"),
        ("../encoder", "encoder"),
    ],
)
def test_names_are_shown_without_the_machine_s_folders(name: str, shown: str) -> None:
    assert shown_name(name, ["google-bert/bert-base-uncased"]) == shown
