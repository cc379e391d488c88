"""What `pip install .` brings: every module, the files that they read, the command; and the bounds of its packages."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:  # comes with pytest
    import tomli as tomllib

INNER = ("data_prep", "ds_configs", "launch", "train")
READ_AT_RUN_TIME = (".py", ".json", ".yaml", ".html", ".c", ".sbatch", ".pbs", ".example")
BUILD = "from setuptools import build_meta; build_meta.build_wheel('dist')"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel, as pip leaves it."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in (*INNER, "halfling"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("halfling-*-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_the_wheel_holds_what_runs(site: Path) -> None:
    wanted = {
        str(path.relative_to(ROOT))
        for name in INNER
        for path in (ROOT / name).rglob("*")
        if path.suffix in READ_AT_RUN_TIME
    }
    assert "train/lamb/native.c" in wanted
    home = site / "halfling"
    assert wanted - {str(path.relative_to(home)) for path in home.rglob("*")} == set()
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"halfling"}
    (about,) = site.glob("halfling-*.dist-info")
    assert "halfling = halfling:main" in (about / "entry_points.txt").read_text()
    assert (about / "licenses" / "LICENSE").exists()


def test_the_installed_command_plans_the_shipped_recipe_from_another_folder(
    site: Path, tmp_path: Path
) -> None:
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import halfling; halfling.main()"
    words = ["plan", "--config", "distilbert-base", "--deepspeed.config=ds_configs/bf16.json"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(site), *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "corpus: " in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_bounds_hold_the_pins() -> None:
    """The tests run with the pins of requirements.txt, which a constraints file may also be."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line]
    assert not [pin.name for pin in pins if pin.extras]
    named = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["mpi"]]
    bounds = {bound.name: bound.specifier for bound in map(Requirement, named)}
    of_jsonargparse = {"docstring-parser", "typeshed-client"}
    assert {pin.name for pin in pins} - of_jsonargparse == set(bounds)
    for pin in pins:
        (version,) = re.findall(r"==([\w.]+)", str(pin.specifier))
        assert pin.name in of_jsonargparse or bounds[pin.name].contains(version), pin
    assert {str(version) for version in ("2.11.0a0+nv26.01", "2.12.0", "2.13.1")} == set(
        bounds["torch"].filter(["2.10.1", "2.11.0a0+nv26.01", "2.12.0", "2.13.1", "2.14.0"])
    )
