"""Says how to get this project's packages where they are missing, before an import fails. Standard library alone."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements.txt"
"""Of a checkout; an installed package has its own list."""


def require_packages() -> None:
    """End the command with one line and exit code 2 where packages of requirements.txt are not installed."""
    missing = [name for name in required() if not _is_installed(name)]
    if not missing:
        return
    others = f" and {len(missing) - 1} more packages are" if len(missing) > 1 else " is"
    remedy = f"pip install -r {REQUIREMENTS}" if REQUIREMENTS.exists() else "pip install halfling"
    if (ROOT / ".venv").is_dir() and Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        remedy = f"type `source {ROOT / '.venv/bin/activate'}` first, or {remedy}"
    print(f"error: {missing[0]}{others} not installed for {sys.executable}: {remedy}", file=sys.stderr)
    sys.exit(2)


def install_command(extra: str) -> str:
    """Installs what requirements-EXTRA.txt lists; an installed package has no such file, and an extra instead."""
    path = ROOT / f"requirements-{extra}.txt"
    return f"pip install -r {path}" if path.exists() else f"pip install 'halfling[{extra}]'"


def required() -> Iterator[str]:
    """Names in requirements.txt; which of several versions of one is wanted does not matter here."""
    if REQUIREMENTS.exists():
        lines = REQUIREMENTS.read_text().splitlines()
    else:
        lines = [line for line in importlib.metadata.requires("halfling") or () if "extra ==" not in line]
    for line in lines:
        if found := re.match(r"[\w-]+", line):
            yield found[0]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:  # or put there without its metadata
        return importlib.util.find_spec(name.replace("-", "_")) is not None
    return True
