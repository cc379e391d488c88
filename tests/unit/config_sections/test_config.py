"""The configuration tree and its command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.common.cli import parse_config
from tests.paths import ROOT
from train.config import Config


def parse(*words: str) -> Config:
    return parse_config(words, "test")


def test_defaults_are_the_published_recipe() -> None:
    config = parse()
    assert config == Config()
    assert (config.training.global_batch_size, config.data.sequence_length) == (4096, 512)
    assert (config.objective.temperature, config.objective.kd_weight) == (2, 5)
    assert (config.objective.mlm_weight, config.objective.cosine_weight) == (2, 1)
    assert (config.masking.probability, config.masking.smoothing) == (0.15, 0.7)
    assert config.model.layer_map == "distilbert"


def test_recipe_overrides_defaults_and_flags_override_recipes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optimizer:\n  lr: 0.5\ntraining:\n  max_steps: 7\n")
    config = parse("--config", str(recipe), "--training.max_steps=9")
    assert config.optimizer.lr == 0.5
    assert config.training.max_steps == 9
    assert config.optimizer.weight_decay == Config().optimizer.weight_decay


def test_a_later_recipe_overrides_an_earlier_one(tmp_path: Path) -> None:
    for name, rate in (("a", 0.1), ("b", 0.2)):
        (tmp_path / name).write_text(f"optimizer: {{lr: {rate}}}\n")
    config = parse("--config", str(tmp_path / "a"), "--config", str(tmp_path / "b"))
    assert config.optimizer.lr == 0.2


def test_launcher_adds_local_rank() -> None:
    assert parse("--local_rank=1") == Config()


def test_lists_and_nulls() -> None:
    config = parse("--model.layer_map=[0,3]", '--model.teacher=["a","b"]', "--model.teacher_weights=[1,2]")
    assert config.model.layer_map == [0, 3]
    assert config.model.teacher == ["a", "b"]
    assert parse("--optimizer.clamp=[0.1,10]").optimizer.clamp == (0.1, 10)


SCRATCH = 'model.teacher=null model.scratch={"model_type":"bert"}'
ADAMW = "optimizer.name=adamw optimizer.lr=1e-3"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("training.epochs=2 training.max_steps=3", r"training.epochs=2.0: has no effect beside"),
        ("objective.kd_weight=0 objective.temperature=7", r"objective.temperature=7.0: has no effect"),
        ("data.cache_dir=cache", r"data.cache_dir='cache': has no effect with the local data.shards"),
        ("data.sequence_length=abc", r"data.sequence_length.*abc"),
        ("run.dir=runs/caf\udce9", r"run.dir='runs/caf\\udce9': give a path in UTF-8"),
        ("optimizer.lr=-1", r"optimizer.lr=-1.0: give a number above 0"),
        ("model.layer_map=foo", r"model.layer_map.*every_other.*foo"),
        ("model.teacher=null", r"model.scratch=None: with model.teacher=null say what to train"),
        (SCRATCH, r"objective.kd_weight=5.0: needs a model.teacher"),
        (
            f"{SCRATCH} objective.kd_weight=0 objective.cosine_weight=0 model.student_layers=3",
            r"model.student_layers=3: has no effect without model.teacher",
        ),
        ('model.scratch={"model_type":"bert"}', r"model.scratch=.*has no effect beside model.teacher"),
        ("model.start_from=a", r"model.start_from='a': has no effect beside model.teacher; remove one"),
        ("model.new_head=true", r"model.new_head=True: goes on a model.start_from without"),
        (
            'model.teacher=null model.start_from=a model.scratch={"model_type":"bert"}',
            r"model.scratch=.*has no effect beside model.start_from; remove one",
        ),
        (
            "model.teacher=null model.start_from=a model.student_layers=3",
            r"model.student_layers=3: has no effect without model.teacher",
        ),
        (
            "model.teacher_weights=[5]",
            r"model.teacher_weights=\[5.0\]: has no effect with one teacher; remove",
        ),
        (
            "objective.kd_weight=0 objective.kd_positions=masked",
            r"objective.kd_positions='masked': has no effect",
        ),
        ("objective.kd_weight=0 objective.mlm_weight=0 objective.cosine_weight=0", "all weights are 0"),
        ("training.micro_batch_size=3", r"training.micro_batch_size=3: must divide .*4096"),
        ("masking.probability=0", r"masking.probability=0.0: give a share between 0 and 1"),
        ("optimizer.prenormalize=true", r"training.gradient_clipping=1.0: .*give 0"),
        ("schedule.warmup_steps=9 training.max_steps=5", r"schedule.warmup_steps=9: is more than"),
        ("objective.layer_cosine_weight=1", r"objective.layer_pairs=\[\]: goes with .*give both or neither"),
        ("objective.projection=true objective.cosine_weight=0", r"objective.projection=True: has no effect"),
        ("objective.relation_heads=4", r"objective.relation_heads=4: has no effect with .*relation_weight=0"),
        ("objective.relation_layers=[[1,1]]", r"objective.relation_layers=.*: has no effect"),
        ("objective.relation_weight=-1", r"objective.relation_weight=-1.0: give 0 or more"),
        (
            "objective.relation_weight=1 objective.relation_heads=0",
            r"objective.relation_heads=0: give a number above 0",
        ),
        (
            "objective.relation_weight=1 objective.relation_layers=[[0,1]]",
            r"objective.relation_layers=\[\(0, 1\)\]: layers count from 1",
        ),
        (
            "objective.relation_weight=1 objective.relation_layers=[[1,1],[1,2]]",
            r"objective.relation_layers=.*: give 1 pairs, one for each teacher",
        ),
        (
            'objective.embedding_weight=1 model.teacher=["a","b"]',
            r"model.teacher=\['a', 'b'\]: vectors of several models lie in spaces of their own; give one",
        ),
        (
            "objective.embedding_weight=1 objective.projection=true objective.cosine_weight=0",
            r"objective.projection=True: has no effect",
        ),
        (
            "objective.kd_weight=0 objective.mlm_weight=0 masking.probability=0.3",
            r"masking=.*: has no effect where no term predicts tokens",
        ),
        ("model.student_heads=0", r"model.student_heads=0: give a number above 0"),
        ("checkpoint.milestone_every_steps=750", r"checkpoint.milestone_every_steps=750: give a multiple of"),
        ("objective.temperature=0", r"objective.temperature=0.0: give a number above 0"),
        ("objective.temperature=.inf", r"objective.temperature=inf: give a number above 0"),
        ("objective.kd_weight=-1", r"objective.kd_weight=-1.0: give 0 or more"),
        ("objective.mlm_weight=.nan", r"objective.mlm_weight=nan: give 0 or more"),
        ("objective.kd_positions=some", r"objective.kd_positions.*some"),
        (
            "objective.layer_cosine_weight=1 objective.layer_pairs=[[1,2,3]]",
            r"objective.layer_pairs.*\[1, 2, 3\]",
        ),
        ("model.teacher=[]", r"model.teacher=\[\]: name at least one teacher"),
        (
            'model.teacher=["a","b"] model.teacher_weights=[1.0,0.0]',
            r"model.teacher_weights=\[1.0, 0.0\]: give 2 weights above 0",
        ),
        ("checkpoint.keep_last=0", r"checkpoint.keep_last=0: give a number above 0"),
        ("optimizer.betas=[0.9,1.0]", r"optimizer.betas=.*: give two numbers in \[0, 1\)"),
        ("optimizer.name=sgd", r"optimizer.name.*sgd"),
        (f"{ADAMW} optimizer.adapt_all=true", r"optimizer.adapt_all=True: is LAMB's and has no effect with"),
        (
            "optimizer.clamp=[2,1]",
            r"optimizer.clamp=\(2.0, 1.0\): give two numbers, 0 <= smallest <= largest",
        ),
        ("optimizer.clamp=[-1,1]", r"optimizer.clamp=\(-1.0, 1.0\): give two numbers"),
        (f"{ADAMW} optimizer.clamp=[0.1,10]", r"optimizer.clamp=\(0.1, 10.0\): is LAMB's .*; remove it"),
        (f"{ADAMW} optimizer.prenormalize=true", r"optimizer.prenormalize=True: is LAMB's .*; remove it"),
        (
            "optimizer.name=adamw",
            r"optimizer.lr=0.00177: is LAMB's default; give a rate for optimizer.name=adamw",
        ),
        ("config=no-such.yaml", r"no-such.yaml"),
    ],
)
def test_refusals_name_field_value_and_remedy(words: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        parse(*(f"--{word}" for word in words.split()))


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "launch" / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_recipe_parses(recipe: Path) -> None:
    config = parse("--config", str(recipe))
    if recipe.stem == "distilbert-base":
        assert config == Config()


def test_help_tells_defaults_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Peak learning rate (You et al. 2020" in text
    assert "default: 0.00177" in text


def test_the_headings_of_help_are_whole() -> None:
    """Help shows the first line of each section's docstring, and a colon."""
    for section in vars(Config()).values():
        heading = type(section).__doc__.strip().splitlines()[0]
        assert heading.endswith("."), heading
