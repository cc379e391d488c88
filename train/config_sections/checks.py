"""What the sections refuse values with."""

from __future__ import annotations

import math
from typing import NoReturn

from train.errors import UserError


def refuse(section: object, name: str, remedy: str) -> NoReturn:
    """UserError with the value of a section's field.

    Args:
        name: "section.field".
    """
    raise UserError(f"{name}={getattr(section, name.rpartition('.')[2])!r}: {remedy}")


def require_at_most(section: object, prefix: str, largest: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if isinstance(value, int | float) and not value <= largest:
            refuse(section, f"{prefix}.{name}", f"give at most {largest:,}")


def require_positive(section: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not value > 0:
            refuse(section, f"{prefix}.{name}", "give a number above 0")


def require_not_negative(section: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not value >= 0:
            refuse(section, f"{prefix}.{name}", "give 0 or more")


def require_sane_number(section: object, name: str, number: object) -> None:
    """Beyond these, arithmetic overflows far from where it could be said why."""
    if isinstance(number, float) and not math.isfinite(number):
        refuse(section, name, "give a finite number")
    if isinstance(number, int) and abs(number) >= 2**31:
        refuse(section, name, f"give at most {2**31 - 1:,}")
