"""Which changes to a recipe an ablation tries (Sanh et al. 2019, arXiv:1910.01108, table 4, and the layer maps).

Pure: a configuration in, names and configuration changes out. launch/ablate.py trains them, launch/ablation/table.py
puts the results side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from train.config import OBJECTIVE_WEIGHTS, Config, ObjectiveConfig
from train.errors import UserError
from train.models.students import default_student_layers, resolve_layer_map
from train.run_folder import WATCHING

FULL = "full"
REPEAT = "full-seed-"
PUBLISHED = {"no-kd": -2.96, "no-cosine": -1.46, "no-mlm": -0.31, "random": -3.69}
"""Sanh et al. 2019, table 4: change of the GLUE score against the full recipe, in points. DistilBERT-base from
BERT-base, trained on Wikipedia and the Toronto Book Corpus."""
FREE_TO_DIFFER = (*WATCHING, "evaluation.every_steps")
"""Between the runs of an ablation: all are scored alike."""


@dataclass(frozen=True)
class Variant:
    """One run of the ablation: the recipe with these keys changed and everything else the same."""

    name: str
    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """{"section.key": value}; empty for the recipe itself."""

    @property
    def words(self) -> list[str]:
        """The flags for launch/pretrain.py."""
        return [f"--{key}={_spelled(value)}" for key, value in self.changes.items()]

    @property
    def changed(self) -> str:
        """What differs, for tables."""
        return " ".join(f"{key}={_spelled(value)}" for key, value in self.changes.items()) or "nothing"

    @property
    def is_repeat(self) -> bool:
        """Whether it is the recipe itself with another seed."""
        return self.name.startswith(REPEAT)


def variants_of(
    config: Config, teacher_layers: int, full_seeds: int = 1
) -> tuple[list[Variant], dict[str, str]]:
    """All variants that make sense for a recipe, and why the others do not.

    Args:
        config: the full recipe; it must have a teacher.
        teacher_layers: of the first teacher, from which the student's layers come.
        full_seeds: how many seeds the full recipe is trained with; further ones tell how large chance is.
    Returns:
        Variants in the order of the table, the full recipe first; {name: reason} of those that are left out.
    """
    if config.model.teacher is None:
        raise UserError(
            "model.teacher=None: an ablation takes terms of the distillation away, and without a teacher there is "
            "none; name a teacher"
        )
    if full_seeds < 1:
        raise UserError(f"--full-seeds {full_seeds}: give at least 1")
    found, left_out = [Variant(FULL, "the recipe as it is")], {}
    candidates = (
        *_terms(config.objective),
        *_random_weights(config, teacher_layers),
        *_soft_target_positions(config.objective),
        *_layer_maps(config, teacher_layers),
    )
    for variant in candidates:
        if isinstance(variant, Variant):
            found.append(variant)
        else:
            left_out[variant[0]] = variant[1]
    seed = config.data.seed
    found += [
        Variant(f"{REPEAT}{extra}", "the recipe with another seed", {"data.seed": seed + extra})
        for extra in range(1, full_seeds)
    ]
    return found, left_out


def chosen_variants(
    variants: Sequence[Variant], left_out: Mapping[str, str], names: Sequence[str]
) -> list[Variant]:
    """The variants of these names in the order of the table, and always the full recipe and its repeats.

    Raises:
        UserError: an unknown name, or one that makes no sense here, with the reason.
    """
    known = {variant.name for variant in variants}
    for name in names:
        if name in left_out:
            raise UserError(f"--variants {name}: {left_out[name]}; leave it out")
        if name not in known:
            raise UserError(f"--variants {name}: no such variant; there are {', '.join(sorted(known))}")
    return [
        variant for variant in variants if variant.name in names or variant.name == FULL or variant.is_repeat
    ]


def _spelled(value: Any) -> str:
    return str(value).replace(" ", "") if isinstance(value, list) else str(value)


def _terms(objective: ObjectiveConfig) -> list[Variant | tuple[str, str]]:
    """The loss's terms taken away one by one."""
    found: list[Variant | tuple[str, str]] = []
    for name, term, title in (
        ("no-kd", "kd_weight", "without the soft targets"),
        ("no-cosine", "cosine_weight", "without the cosine of the hidden states"),
        ("no-mlm", "mlm_weight", "without masked-language modelling"),
    ):
        others = [weight for weight in OBJECTIVE_WEIGHTS if weight != term]
        if not getattr(objective, term):
            found.append((name, f"the recipe has objective.{term}=0 already"))
        elif not any(getattr(objective, weight) for weight in others):
            found.append((name, f"the recipe has no other term than objective.{term}"))
        else:
            found.append(Variant(name, title, {f"objective.{term}": 0.0, **_left_idle(objective, term)}))
    return found


def _soft_target_positions(objective: ObjectiveConfig) -> list[Variant | tuple[str, str]]:
    name, changes = "masked-kd", {"objective.kd_positions": "masked"}
    if objective.kd_positions == "masked":
        return [(name, "the recipe has objective.kd_positions=masked already")]
    if not objective.kd_weight + objective.mse_weight:
        return [(name, "the recipe has objective.kd_weight=0")]
    return [Variant(name, "soft targets at the masked positions alone", changes)]


def _left_idle(objective: ObjectiveConfig, term: str) -> dict[str, Any]:
    """Settings that would have no effect without the term, which the configuration refuses; at their defaults."""
    idle: list[str] = []
    if term == "kd_weight":
        idle = ["temperature"] if objective.mse_weight else ["temperature", "kd_positions"]
    elif term == "cosine_weight" and not objective.layer_cosine_weight:
        idle = ["projection"]
    defaults = ObjectiveConfig()
    return {
        f"objective.{name}": getattr(defaults, name)
        for name in idle
        if getattr(objective, name) != getattr(defaults, name)
    }


def _student_layers(config: Config, teacher_layers: int) -> tuple[tuple[int, ...] | None, int]:
    """The teacher's layers that the recipe's student starts from (None: random weights), and how many it has."""
    model = config.model
    if model.layer_map == "random":
        return None, model.student_layers or default_student_layers(teacher_layers)
    layers = resolve_layer_map(model.layer_map, teacher_layers, model.student_layers)
    return layers, len(layers)


def _same_depth(config: Config, teacher_layers: int, depth: int) -> dict[str, Any]:
    """A list of layers says how many there are; a name means half the teacher's unless told."""
    told = config.model.student_layers is not None or depth == default_student_layers(teacher_layers)
    return {} if told else {"model.student_layers": depth}


def _random_weights(config: Config, teacher_layers: int) -> list[Variant | tuple[str, str]]:
    layers, depth = _student_layers(config, teacher_layers)
    if layers is None:
        return [("random", "the recipe has model.layer_map=random already")]
    changes = {"model.layer_map": "random", **_same_depth(config, teacher_layers, depth)}
    return [Variant("random", "from random weights, with the same teacher", changes)]


LAYER_MAPS = {
    "every-other": "evenly spaced layers",
    "distilbert": "the original code's layers 0,2,4,7,9,11",
    "first-half": "the first layers",
    "last-half": "the last layers",
}


def _layer_maps(config: Config, teacher_layers: int) -> list[Variant | tuple[str, str]]:
    """Other layers of the teacher, as many as the recipe's student has."""
    layers, depth = _student_layers(config, teacher_layers)
    if config.model.student_width is not None:
        reason = f"a student of width {config.model.student_width} cannot copy the teacher's layers"
        return [(name, reason) for name in LAYER_MAPS]
    if depth > teacher_layers:
        reason = f"the student has {depth} layers, the teacher only {teacher_layers} to copy"
        return [(name, reason) for name in LAYER_MAPS]
    found, seen = [], {layers: FULL}
    for name in LAYER_MAPS:
        variant = _layer_map(name, teacher_layers, depth, seen)
        if isinstance(variant, Variant) and name == "every-other":
            changes = {**variant.changes, **_same_depth(config, teacher_layers, depth)}
            variant = dataclasses.replace(variant, changes=changes)
        found.append(variant)
    return found


def _layer_map(
    name: str, teacher_layers: int, depth: int, seen: dict[tuple[int, ...] | None, str]
) -> Variant | tuple[str, str]:
    """A layer map; `seen` gathers the layers that another variant starts from already."""
    if name == "distilbert" and (teacher_layers, depth) != (12, 6):
        return name, (
            f"takes 6 layers of a teacher of 12; this student has {depth}, its teacher {teacher_layers}"
        )
    values: dict[str, str | list[int]] = {
        "every-other": "every_other",
        "distilbert": "distilbert",
        "first-half": list(range(depth)),
        "last-half": list(range(teacher_layers - depth, teacher_layers)),
    }
    value = values[name]
    layers = resolve_layer_map(value, teacher_layers, depth)
    if layers in seen:
        return name, f"has the same layers {list(layers)} as {seen[layers]}"
    seen[layers] = name
    return Variant(
        name, f"from {LAYER_MAPS[name]} of the teacher, {list(layers)}", {"model.layer_map": value}
    )
