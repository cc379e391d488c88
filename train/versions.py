"""Versions of what a run depends on. Needs nothing but Python: the doctor asks hosts that may lack all of it."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "webdataset", "numpy")


def installed_versions() -> dict[str, str]:
    """Python's and the packages' versions; "missing" for one that is not there."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found
