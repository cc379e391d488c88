"""A recipe with some terms of its objective alone: what else must then change, since it would have no effect."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from train.config import Config
from train.config_sections.objective import OBJECTIVE_WEIGHTS

SERVES = {
    "temperature": {"kd_weight"},
    "kd_positions": {"kd_weight", "mse_weight"},
    "projection": {"cosine_weight", "layer_cosine_weight"},
    "layer_pairs": {"layer_cosine_weight"},
    "relation_heads": {"relation_weight"},
    "relation_layers": {"relation_weight"},
}
"""Setting of the objective -> the terms of which one must be on."""
PREDICT_TOKENS = {"kd_weight", "mse_weight", "mlm_weight"}
"""Terms without which nothing is masked."""


def terms_alone(config: Config, kept: Collection[str]) -> dict[str, Any]:
    """The changes that leave only these of a recipe's terms; settings of the others, which the configuration would
    refuse as idle, go back to their defaults.

    Args:
        kept: names of OBJECTIVE_WEIGHTS; those that the recipe has off stay off.
    """
    objective = config.objective
    was_on = {name for name in OBJECTIVE_WEIGHTS if getattr(objective, name)}
    on = was_on & set(kept)
    changes: dict[str, Any] = {f"objective.{name}": 0.0 for name in OBJECTIVE_WEIGHTS if name in was_on - on}
    changes |= at_defaults("objective", objective, [name for name, terms in SERVES.items() if not terms & on])
    if not on & PREDICT_TOKENS:
        changes |= at_defaults("masking", config.masking, vars(config.masking))
    return changes


def at_defaults(section: str, settings: Any, names: Iterable[str]) -> dict[str, Any]:
    """The changes that give settings of a section their defaults, where they have another value."""
    defaults = type(settings)()
    found = {f"{section}.{name}": getattr(defaults, name) for name in names}
    return {key: value for key, value in found.items() if getattr(settings, key.split(".")[1]) != value}
