"""What the variants of an ablation change, and which a recipe has no use for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from launch.ablation.variants import FULL, chosen_variants, variants_of
from launch.common.cli import parse_config
from launch.experiments.variant import Variant
from tests.unit.launch.ablation.test_ablation import HIDDEN, QUICKSTART
from train.config_sections.objective import OBJECTIVE_WEIGHTS
from train.errors import UserError
from train.models.students import resolve_layer_map
from train.run_folder import as_tree, flatten

ADAMW = ["--optimizer.name=adamw", "--optimizer.lr=0.001"]
RELATIONS = [f"--objective.{name}={int(name == 'relation_weight')}" for name in OBJECTIVE_WEIGHTS]


def variants(
    words: Sequence[str], teacher_layers: int, full_seeds: int = 1
) -> tuple[dict[str, Variant], dict]:
    found, left_out = variants_of(parse_config(words, ""), teacher_layers, full_seeds)
    return {variant.name: variant for variant in found}, left_out


@pytest.mark.parametrize(
    ("words", "teacher_layers"),
    [
        (QUICKSTART, 4),
        ([], 12),
        (["--model.layer_map=[1,5,11]"], 12),
        (["--model.layer_map=random"], 12),
        (["--model.layer_map=random", "--model.student_layers=3", "--objective.kd_positions=masked"], 12),
        (["--objective.temperature=3", "--objective.kd_positions=masked"], 12),
        (["--objective.kd_positions=masked", "--objective.mse_weight=1"], 12),
        (["--objective.projection=true"], 12),
        (["--optimizer.clamp=[0.1,10]", "--optimizer.lr=0.001", "--masking.whole_word=true"], 12),
        (["--optimizer.prenormalize=true", "--training.gradient_clipping=0"], 12),
        ([*HIDDEN, "--objective.projection=true"], 12),
    ],
)
def test_each_variant_is_accepted_and_differs_in_exactly_what_it_says(
    words: list[str], teacher_layers: int
) -> None:
    base = flatten(as_tree(parse_config(words, "")))
    found, left_out = variants(words, teacher_layers, full_seeds=3)
    assert {"full", "no-kd", "no-cosine", "no-mlm", "full-seed-1", "full-seed-2"} <= set(found)
    assert len(found) + len(left_out) == 15
    for name, variant in found.items():
        config = flatten(as_tree(parse_config([*words, *variant.words], "")))
        assert {key: value for key, value in config.items() if value != base[key]} == variant.changes, name
        assert bool(variant.changes) == (name != FULL)


def test_what_the_variants_of_the_quickstart_change() -> None:
    found, left_out = variants(QUICKSTART, 4)
    assert {name: variant.changed for name, variant in found.items()} == {
        "full": "nothing",
        "no-kd": "objective.kd_weight=0.0",
        "no-cosine": "objective.cosine_weight=0.0",
        "no-mlm": "objective.mlm_weight=0.0",
        "random": "model.layer_map=random",
        "masked-kd": "objective.kd_positions=masked",
        "first-half": "model.layer_map=[0,1]",
        "last-half": "model.layer_map=[2,3]",
        "relations": "objective.kd_weight=0.0 objective.mlm_weight=0.0 objective.cosine_weight=0.0 "
        "masking.smoothing=0.7 objective.relation_weight=1.0",
        "adamw": "optimizer.name=adamw optimizer.lr=0.001",
        "masking-30": "masking.probability=0.3",
    }
    assert left_out == {
        "every-other": "has the same layers [0, 2] as full",
        "distilbert": "takes 6 layers of a teacher of 12; this student has 2, its teacher 4",
    }


def test_a_narrower_student_inherits_other_layers_too() -> None:
    assert "first-half" in variants(["--model.student_width=384"], 12)[0]


def test_layer_maps_of_the_published_recipe() -> None:
    found, left_out = variants([], 12)
    assert list(found)[-6:-3] == ["every-other", "first-half", "last-half"]
    assert found["last-half"].words == ["--model.layer_map=[6,7,8,9,10,11]"]
    assert left_out == {"distilbert": "has the same layers [0, 2, 4, 7, 9, 11] as full"}
    assert "distilbert" in variants(["--model.layer_map=every_other"], 12)[0]


@pytest.mark.parametrize("name", ["random", "every-other", "first-half", "last-half"])
def test_every_student_has_as_many_layers_as_the_recipes(name: str) -> None:
    """A recipe that lists three layers: a name alone would mean half of the teacher's twelve."""
    words = ["--model.layer_map=[1,5,11]"]
    model = parse_config([*words, *variants(words, 12)[0][name].words], "").model
    if model.layer_map == "random":
        assert model.student_layers == 3
    else:
        assert len(resolve_layer_map(model.layer_map, 12, model.student_layers)) == 3


@pytest.mark.parametrize(
    ("words", "name", "reason"),
    [
        (["--objective.cosine_weight=0"], "no-cosine", "the recipe has objective.cosine_weight=0 already"),
        (["--objective.cosine_weight=0", "--objective.mlm_weight=0"], "no-kd", "no other term than"),
        (["--objective.kd_positions=masked"], "masked-kd", "objective.kd_positions=masked already"),
        (["--objective.kd_weight=0"], "masked-kd", "the recipe has objective.kd_weight=0"),
        (ADAMW, "adamw", "the recipe has optimizer.name=adamw already"),
        (["--masking.probability=0.3"], "masking-30", "the recipe has masking.probability=0.3 already"),
        (RELATIONS, "masking-30", "no term of the recipe predicts tokens"),
        (RELATIONS, "relations", "the recipe trains relations alone already"),
        (["--model.layer_map=random"], "random", "model.layer_map=random already"),
        (
            ["--model.layer_map=random", "--model.student_width=384"],
            "first-half",
            "random student of width 384",
        ),
        (["--model.layer_map=random", "--model.student_layers=13"], "last-half", "13 layers, the teacher"),
    ],
)
def test_what_makes_no_sense_is_left_out_with_a_reason(words: list[str], name: str, reason: str) -> None:
    found, left_out = variants(words, 12)
    assert name not in found
    assert reason in left_out[name]


def test_refusals_of_the_variants() -> None:
    found, left_out = variants_of(parse_config(QUICKSTART, ""), 4, 2)
    assert [v.name for v in chosen_variants(found, left_out, ["no-mlm"])] == ["full", "no-mlm", "full-seed-1"]
    with pytest.raises(
        UserError, match=r"--variants no-such: no such variant; there are adamw, first-half, full,"
    ):
        chosen_variants(found, left_out, ["no-such"])
    with pytest.raises(
        ValueError, match=r"--variants distilbert: takes 6 layers of a teacher of 12.*leave it out"
    ):
        chosen_variants(found, left_out, ["distilbert"])
    with pytest.raises(UserError, match="--full-seeds 0: give at least 1"):
        variants(QUICKSTART, 4, 0)
    scratch = ["--model.teacher=null", "--model.scratch={model_type: bert}", "--objective.kd_weight=0"]
    with pytest.raises(UserError, match=r"model\.teacher=None: an ablation takes terms of the distillation"):
        variants([*scratch, "--objective.cosine_weight=0"], 0)
