"""What the sections refuse values with."""

from __future__ import annotations

import math

from train.errors import UserError


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise UserError(f"{name}={value!r}: {remedy}")


def require_at_most(section: object, prefix: str, largest: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        numeric = isinstance(value, int | float)
        require(not numeric or value <= largest, f"{prefix}.{name}", value, f"give at most {largest:,}")


def require_positive(section: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        require(value is None or value > 0, f"{prefix}.{name}", value, "give a number above 0")


def require_sane_number(number: object, name: str, value: object) -> None:
    """Beyond these, arithmetic overflows far from where it could be said why."""
    if isinstance(number, float):
        require(math.isfinite(number), name, value, "give a finite number")
    elif isinstance(number, int):
        require(abs(number) < 2**31, name, value, f"give at most {2**31 - 1:,}")
