"""Without the project's packages every command says how to get them, instead of a traceback."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.passes.near_duplicates import Signatures
from data_prep.shard_format import required_packages
from data_prep.shard_format.errors import UserError
from data_prep.shard_format.manifest import Manifest
from data_prep.shard_format.required_packages import install_command, require_packages, required
from data_prep.sources import pages
from tests.paths import ROOT
from train.export.onnx_check import require_onnx
from train.loop.trackers import require_trackers

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


@pytest.mark.parametrize(
    ("extra", "package", "use"),
    [
        ("sources", "datasketch", Signatures),
        ("sources", "trafilatura", pages._extractor.__wrapped__),
        ("remote", "gcsfs", lambda: Manifest.load("gs://bucket/of-an-extra")),
        ("onnx", "onnx", require_onnx),
        ("trackers", "mlflow", lambda: require_trackers(["mlflow"])),
    ],
)
def test_an_installed_package_names_its_extra(
    extra: str,
    package: str,
    use: Callable[[], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has no requirements-*.txt."""
    assert install_command(extra) == f"pip install -r {ROOT}/requirements-{extra}.txt"
    find_spec = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find_spec(name, *rest)
    )
    monkeypatch.setattr(required_packages, "ROOT", tmp_path)
    with pytest.raises(UserError, match=re.escape(f"pip install 'halfling[{extra}]'")):
        use()
