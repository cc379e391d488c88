"""Which changes to a recipe an ablation tries (Sanh et al. 2019, arXiv:1910.01108, table 4, and the layer maps).

Pure: a configuration in, names and configuration changes out. launch/ablate.py trains them, launch/ablation/table.py
puts the results side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.experiments.objective_changes import at_defaults, terms_alone
from launch.experiments.variant import Variant
from train.config import Config
from train.config_sections.objective import OBJECTIVE_WEIGHTS, ObjectiveConfig
from train.config_sections.training import LAMB_OPTIONS
from train.errors import UserError
from train.models.students import default_student_layers, resolve_layer_map

FULL = "full"
REPEAT = "full-seed-"
PUBLISHED = {"no-kd": -2.96, "no-cosine": -1.46, "no-mlm": -0.31, "random": -3.69}
"""Sanh et al. 2019, table 4: change of the GLUE score against the full recipe, in points. DistilBERT-base from
BERT-base, trained on Wikipedia and the Toronto Book Corpus."""
TERMS = {
    "no-kd": ("kd_weight", "without the soft targets"),
    "no-cosine": ("cosine_weight", "without the cosine of the hidden states"),
    "no-mlm": ("mlm_weight", "without masked-language modelling"),
}
ADAMW, ADAMW_RATE = "adamw", 1e-3
"""Its rate where none is given: that of Izsak et al. 2021 (arXiv:2104.07705) at a batch of 4,096."""
MORE_MASKED = 0.3
"""Share of the tokens; Wettig et al. 2023 (arXiv:2202.08005) found it better than 15 % for larger models."""


def variants_of(
    config: Config,
    teacher_layers: int,
    full_seeds: int = 1,
    adamw_rates: Sequence[float] = (ADAMW_RATE,),
) -> tuple[list[Variant], dict[str, str]]:
    """All variants that make sense for a recipe, and why the others do not.

    Args:
        config: the full recipe; it must have a teacher.
        teacher_layers: of the first teacher, from which the student's layers come.
        full_seeds: how many seeds the full recipe is trained with; further ones show how large chance is.
        adamw_rates: peak learning rates, each of which AdamW is tried with.
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
    student = _student(config, teacher_layers)
    candidates = [
        Variant(FULL, "the recipe as it is", is_required=True),
        *(_without_term(name, config) for name in TERMS),
        _random_weights(config, student),
        _masked_soft_targets(config.objective),
        *_layer_maps(config, student),
        _relations(config),
        *_adamw(config, adamw_rates),
        _masking(config),
    ]
    candidates += [
        Variant(f"{REPEAT}{extra}", "the recipe with another seed", {"data.seed": config.data.seed + extra})
        for extra in range(1, full_seeds)
    ]
    left_out = {variant.name: variant.left_out for variant in candidates if variant.left_out}
    return [variant for variant in candidates if not variant.left_out], left_out


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
        variant
        for variant in variants
        if variant.name in names or variant.name == FULL or variant.name.startswith(REPEAT)
    ]


def _without_term(name: str, config: Config) -> Variant:
    term, title = TERMS[name]
    objective = config.objective
    others = [weight for weight in OBJECTIVE_WEIGHTS if weight != term]
    if not getattr(objective, term):
        return Variant(name, title, left_out=f"the recipe has objective.{term}=0 already")
    if not any(getattr(objective, weight) for weight in others):
        return Variant(name, title, left_out=f"the recipe has no other term than objective.{term}")
    return Variant(name, title, terms_alone(config, others))


def _masked_soft_targets(objective: ObjectiveConfig) -> Variant:
    reason = ""
    if objective.kd_positions == "masked":
        reason = "the recipe has objective.kd_positions=masked already"
    elif not objective.kd_weight + objective.mse_weight:
        reason = "the recipe has objective.kd_weight=0"
    title = "soft targets at the masked positions alone"
    return Variant("masked-kd", title, {"objective.kd_positions": "masked"}, reason)


def _relations(config: Config) -> Variant:
    """MiniLMv2's objective in place of the recipe's terms; what goes with these, and masking, at their defaults."""
    objective = config.objective
    others = [name for name in OBJECTIVE_WEIGHTS if name != "relation_weight" and getattr(objective, name)]
    reason = "" if others else "the recipe trains relations alone already"
    changes = terms_alone(config, ["relation_weight"])
    if not objective.relation_weight:
        changes["objective.relation_weight"] = 1.0
    return Variant("relations", "relations of queries, keys and values alone (MiniLMv2)", changes, reason)


def _adamw(config: Config, rates: Sequence[float]) -> list[Variant]:
    """AdamW at rates of its own: LAMB's means nothing to it."""
    settings = config.optimizer
    reason = "the recipe has optimizer.name=adamw already" if settings.name == "adamw" else ""
    idle = at_defaults("optimizer", settings, LAMB_OPTIONS)
    found = []
    for rate in rates:
        changes = {
            "optimizer.name": "adamw",
            **({} if rate == settings.lr else {"optimizer.lr": rate}),
            **idle,
        }
        name = ADAMW if len(rates) == 1 else f"{ADAMW}-{rate:g}"
        found.append(Variant(name, f"AdamW at a peak learning rate of {rate:g}", changes, reason))
    return found


def _masking(config: Config) -> Variant:
    reason = ""
    if not config.objective.needs_masks:
        reason = "no term of the recipe predicts tokens"
    elif config.masking.probability == MORE_MASKED:
        reason = f"the recipe has masking.probability={MORE_MASKED} already"
    title = f"{MORE_MASKED:.0%} of the tokens masked"
    return Variant("masking-30", title, {"masking.probability": MORE_MASKED}, reason)


@dataclass(frozen=True)
class _Student:
    """The recipe's student, and the teacher that it is made from."""

    layers: tuple[int, ...] | None
    """The teacher's layers that it starts from; None for random weights."""
    depth: int
    teacher_layers: int
    same_depth: Mapping[str, Any]
    """The change that keeps the depth where a layer map's name alone would mean half of the teacher's layers."""


def _student(config: Config, teacher_layers: int) -> _Student:
    model, half = config.model, default_student_layers(teacher_layers)
    if model.layer_map == "random":
        layers, depth = None, model.student_layers or half
    else:
        layers = resolve_layer_map(model.layer_map, teacher_layers, model.student_layers)
        depth = len(layers)
    is_known = model.student_layers is not None or depth == half
    return _Student(layers, depth, teacher_layers, {} if is_known else {"model.student_layers": depth})


def _random_weights(config: Config, student: _Student) -> Variant:
    reason = "the recipe has model.layer_map=random already" if config.model.layer_map == "random" else ""
    changes = {"model.layer_map": "random", **student.same_depth}
    return Variant("random", "from random weights, with the same teacher", changes, reason)


def _layer_maps(config: Config, student: _Student) -> list[Variant]:
    """Other layers of the teacher, as many as the recipe's student has; none twice."""
    depth, teacher_layers = student.depth, student.teacher_layers
    maps: dict[str, tuple[str, dict[str, Any]]] = {
        "every-other": ("evenly spaced layers", {"model.layer_map": "every_other", **student.same_depth}),
        "distilbert": ("the original code's layers 0,2,4,7,9,11", {"model.layer_map": "distilbert"}),
        "first-half": ("the first layers", {"model.layer_map": list(range(depth))}),
        "last-half": (
            "the last layers",
            {"model.layer_map": list(range(teacher_layers - depth, teacher_layers))},
        ),
    }
    reason = ""
    model = config.model
    sizes = (model.student_width, model.student_heads, model.student_feed_forward)
    if model.layer_map == "random" and sizes != (None, None, None):
        reason = f"a random student of width {model.student_width} need not be a part of its teacher"
    elif depth > teacher_layers:
        reason = f"the student has {depth} layers, the teacher only {teacher_layers} to copy"
    if reason:
        return [Variant(name, title, left_out=reason) for name, (title, _) in maps.items()]
    found, names = [], {student.layers: FULL}
    for name, (title, changes) in maps.items():
        if name == "distilbert" and (teacher_layers, depth) != (12, 6):
            reason = (
                f"takes 6 layers of a teacher of 12; this student has {depth}, its teacher {teacher_layers}"
            )
            found.append(Variant(name, title, left_out=reason))
            continue
        layers = resolve_layer_map(changes["model.layer_map"], teacher_layers, depth)
        reason = f"has the same layers {list(layers)} as {names[layers]}" if layers in names else ""
        names.setdefault(layers, name)
        found.append(Variant(name, f"from {title} of the teacher, {list(layers)}", changes, reason))
    return found
