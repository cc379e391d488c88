"""One run of an experiment: a name, and what it changes in the configuration that all runs share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One run: a recipe with these keys changed and everything else the same."""

    name: str
    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """{"section.key": value}; empty for the recipe itself."""
    left_out: str = ""
    """Why it makes no sense for this recipe; empty where it does."""

    is_required: bool = False
    """Whether the runs after it mean nothing without it."""

    @property
    def words(self) -> list[str]:
        """The flags for launch/pretrain.py."""
        return [f"--{key}={_spelled(value)}" for key, value in self.changes.items()]

    @property
    def changed(self) -> str:
        """What differs, for tables."""
        return " ".join(f"{key}={_spelled(value)}" for key, value in self.changes.items()) or "nothing"


def _spelled(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).replace(" ", "") if isinstance(value, list) else str(value)
