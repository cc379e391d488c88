"""Without the project's packages every command says how to get them, instead of a traceback."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from data_prep.shard_format.required_packages import require_packages, required
from tests.paths import ROOT

SCRIPTS = [
    str(path.relative_to(ROOT))
    for folder in ("launch", "data_prep")
    for path in sorted((ROOT / folder).glob("*.py"))
    if 'if __name__ == "__main__"' in path.read_text()
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_without_packages_gets_one_line(script: str) -> None:
    # -S: without site-packages, as the system's python is.
    done = subprocess.run([sys.executable, "-S", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: torch and \d+ more packages are not installed for .*python\S*: ", line)
    assert line.endswith(f"pip install -r {ROOT}/requirements.txt")
    assert done.stdout == ""


def test_nothing_is_said_where_all_are_installed() -> None:
    assert len(SCRIPTS) > 10
    assert {"jsonargparse", "torch", "scikit-learn"} <= set(required())
    require_packages()
