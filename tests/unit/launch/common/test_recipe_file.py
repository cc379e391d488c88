"""A damaged or mistyped recipe: one line that names the file, the key and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.common.cli import parse_config
from launch.common.recipe_file import read_recipe_file
from train.errors import UserError

REFUSED = {
    "": "holds no sections; give at least one .model, data",
    "- a\n": "holds no sections",
    "training: [1, 2]\n": r"training: holds \[1, 2\] in place of keys; write training: {global_batch_size: ...}",
    "training:\n": "training: holds nothing in place of keys",
    "optimizer: 3\n": "optimizer: holds 3 in place of keys; write optimizer: {name: ...}, or remove it",
    "model: bert\n": "model: holds 'bert' in place of keys",
    "trainin:\n  max_steps: 3\n": r"trainin: no such section; did you mean training\?",
    "max_steps: 3\n": r"max_steps: no such section; did you mean training.max_steps\?",
    "training.max_step: 3\n": r"training.max_step: no such key; did you mean training.max_steps\?",
    "training:\n  max_step: 3\n": r"training.max_step: no such key; did you mean training.max_steps\?",
    "training:\n  lr: 3\n": r"training.lr: no such key; did you mean optimizer.lr\?",
    "optimizer:\n  learning_rate: 1\n": "optimizer.learning_rate: no such key; give one of name, lr, betas",
    "3: 4\n": "3: no such section",
    "model:\n  teacher: caf\u00e9\n": "byte 21 is no UTF-8; save the file as UTF-8",
    "training:\n  max_steps: 3\n  max_steps: 4\n": "line 3, column 3: 'max_steps' stands there twice; mend this line",
    "training: {max_steps: 3}\ntraining.max_steps: 4\n": "training.max_steps: stands there twice, alone and in its sec",
    "training: {max_steps: !!bool x}\n": r"cannot be read as YAML \('x'\); mend it",
    "training: {max_steps: !!timestamp x}\n": "cannot be read as YAML",
    "model: {scratch: {a: 1, a: 2}}\n": "line 1, column 25: 'a' stands there twice",
    "training:\n\tmax_steps: 3\n": "line 2, column 1: .*; mend this line",
    "training:\n  ? [1]\n  : 3\n": "line 2, column 5: .*unhashable",
    "training: {epochs: 1}\n---\ntraining: {epochs: 2}\n": "line 2, column 1: .*another document",
    "model: !!python/object/apply:os.system ['exit 1']\n": "line 1, column 8: could not determine a constructor",
    "model: " + "[" * 1200: "cannot be read as YAML",
    "model: &a\n  teacher: *a\n": "a value holds itself",
    "optimizer:\n  lr: .nan\n": "optimizer.lr=nan: give a finite number",
    "optimizer:\n  weight_decay: 1.0e+400\n": "optimizer.weight_decay=inf: give a finite number",
    "optimizer:\n  betas: [0.9, -.inf]\n": r"optimizer.betas=\[0.9, -inf\]: give a finite number",
    "training:\n  max_steps: " + "9" * 5000: r"cannot be read as YAML \(Exceeds the limit",
    "training:\n  max_steps: 1" + "0" * 30: "training.max_steps=10{30}: give at most 99,999,999",
    "evaluation:\n  max_windows: 3000000000\n": "evaluation.max_windows=3000000000: give at most 2,147,483,647",
    "data:\n  lanes: 100000\n": "data.lanes=100000: give at most 65,536",
    "run:\n  hang_timeout_s: 1.0e+300\n": r"run.hang_timeout_s=1e\+300: give at most 10,000,000",
    "run:\n  dir: ''\n": "run.dir='': is empty; give a value",
    "training:\n  max_steps: true\n": r"training.max_steps: give int \| null, not True",
    "evaluation:\n  every_steps: ''\n": "evaluation.every_steps: give int, not an empty text",
    "optimizer:\n  name: sgd\n": r"optimizer.name: give lamb \| adamw, not sgd",
    "model:\n  layer_map: all\n": r"model.layer_map: give every_other \| last_of_each \| distilbert \| random",
    "optimizer:\n  lr: fast\n": "optimizer.lr: give float, not fast",
    "optimizer:\n  lr: ' '\n": "optimizer.lr: give float, not an empty text",
    "model:\n  teacher_weights: ''\n": r"model.teacher_weights: give list\[float\] \| null, not an empty text",
    "optimizer:\n  lr: -1\n": "optimizer.lr=-1.0: give a number above 0",
}


def parse(recipe: Path) -> None:
    read_recipe_file(recipe)  # most end here, without the parser's tenth of a second
    parse_config(["--config", str(recipe)], "")


@pytest.mark.parametrize(("text", "expected"), REFUSED.items(), ids=range(len(REFUSED)))
def test_a_recipe_is_refused_in_one_line_with_file_key_and_remedy(
    text: str, expected: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"^{recipe}: {expected}") as refused:
        parse(recipe)
    assert "\n" not in str(refused.value)


def test_what_a_flag_overrides_is_not_blamed_on_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optimizer:\n  lr: 0.1\ntraining.max_steps: 7\n")
    assert parse_config([f"--config={recipe}"], "").training.max_steps == 7
    with pytest.raises(UserError, match=r"^optimizer.lr=-1.0: give a number above 0"):
        parse_config([f"--config={recipe}", "--optimizer.lr=-1"], "")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--trainin.max_steps=3", "did you mean training.max_steps?"),
        ("--training.max_step=3", "did you mean training.max_steps?"),
        ("--max_steps=3", "did you mean training.max_steps?"),
        ("--optimizer.betas+=0.1", "did you mean optimizer.betas?"),
        ("--run.logs=3", "give one of dir, log_every_steps, "),
        ("--zzz=3", "give one of model, data, "),
    ],
)
def test_a_mistyped_flag_names_the_nearest(word: str, meant: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_config([word], "")
    assert str(refused.value).startswith(f"unrecognized arguments: {word}: no such key; {meant}")
