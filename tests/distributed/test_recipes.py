"""Every recipe for a published teacher trains: two steps, with a tiny stand-in of the teacher's family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

from tests.distributed.pretraining import start_alone
from tests.paths import ROOT
from tests.unit.export.test_sentence_files import write_sentence_files
from train.loop.metrics import read_rows

RECIPES = ROOT / "launch" / "recipes"
FAMILY_OF = {
    "distilbert-base": "bert",
    "distilroberta": "roberta",
    "domain-student": "bert",
    "domain-teacher": "bert",
    "minilm-embeddings": "bert",
    "minilm-from-embeddings": "bert",
    "minilm-hidden": "bert",
    "minilm-relations": "bert",
    "modernbert-half": "modernbert",
    "xlmr-one-language": "xlm-roberta",
}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 80,
}
OF_SIZES = {
    "minilm-from-embeddings": (
        "--model.student_width=16",
        "--model.student_layers=2",
        "--objective.relation_heads=4",
    ),
    "minilm-relations": ("--objective.relation_heads=4",),
}
"""What of a recipe the stand-in is too small for."""
SMALL = (
    "--data.sequence_length=32",
    "--training.global_batch_size=64",
    "--training.max_steps=2",
    "--evaluation.max_windows=8",
    "--run.log_every_steps=1",
)
HEADS = ("Cost: ", "Expect", "Run of it: ", "  deepspeed ")


def stand_in(folder: Path, family: str, tokenizer_folder: str, with_head: bool) -> str:
    """A random model of a family, with the tests' vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "cls_token_id", "sep_token_id")}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **SIZES, **special)
    torch.manual_seed(0)
    (AutoModelForMaskedLM if with_head else AutoModel).from_config(config).save_pretrained(folder)
    if not with_head:
        write_sentence_files(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_all_are_here() -> None:
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    assert {name for name in names if not name.startswith("quickstart")} == {*FAMILY_OF}


@pytest.mark.parametrize("name", FAMILY_OF)
def test_two_steps(name: str, shards_folder: str, tokenizer_folder: str, tmp_path: Path) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    for head in HEADS:
        assert f"# {head}" in text
    recipe = yaml.safe_load(text)
    with_head = recipe.get("objective", {}).get("mlm_weight") != 0
    folder = stand_in(tmp_path / "teacher", FAMILY_OF[name], tokenizer_folder, with_head)
    key = "start_from" if "start_from" in recipe.get("model", {}) else "teacher"
    flags = ["--config", str(RECIPES / f"{name}.yaml"), f"--run.dir={tmp_path / 'run'}", *SMALL]
    flags += [
        f"--data.shards={shards_folder}",
        f"--model.{key}={folder}",
        *OF_SIZES.get(name, ()),
    ]
    if "layer_map" not in recipe.get("model", {}) and key == "teacher":  # the default is one of twelve layers
        flags.append("--model.layer_map=every_other")
    run = start_alone(flags, tmp_path / "run")
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 0, output
    losses = [row["loss"] for row in read_rows(tmp_path / "run") if "loss" in row]
    assert len(losses) == 2
    assert all(loss is not None and loss > 0 for loss in losses)
    made = AutoConfig.from_pretrained(tmp_path / "run" / "model")
    depth = made.num_hidden_layers
    assert depth == (4 if key == "start_from" else 2)
    assert made.hidden_size == (16 if "student_width" in recipe.get("model", {}) else 32)
