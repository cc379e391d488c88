"""Files that a user writes by hand: hostfile, cluster.env, recipe, DeepSpeed's JSON."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import yaml

from launch.common.cli import parse_config
from launch.preflight.hosts import Host, read_hostfile
from tests.fuzzing.target import Target
from tests.paths import ROOT
from train.config import Config
from train.engine_config import engine_settings, read_engine_config, resolve_engine_config
from train.environment_file import FILE, load_environment_file
from train.run_folder import as_tree, flatten

HOSTS = (
    "# eight GPUs each\nnode-1 slots=8\nnode-2 slots=8  # the second\n\nnode-3.cluster slots=4 max_slots=4\n"
)
ENVIRONMENT = """# a comment
HF_HOME=/scratch/hf
export HTTPS_PROXY="http://proxy:3128"

NCCL_DEBUG='INFO'
EMPTY=
"""


SECTIONS = tuple(f"{name}." for name in Config.__dataclass_fields__)


def _make_hostfile(folder: Path) -> None:
    (folder / "hostfile").write_text(HOSTS)


def _as_deepspeed_reads(hosts: list[Host], expected: Any, folder: Path) -> str | None:
    from deepspeed.launcher.runner import _parse_hostfile

    try:
        theirs = dict(_parse_hostfile((folder / "hostfile").read_text().splitlines(keepends=True)))
    except ValueError as error:
        return f"deepspeed refuses it ({error})"
    ours = {host.name: host.slots for host in hosts}
    return None if ours == theirs else f"deepspeed reads {theirs}, we {ours}"


def _make_environment(folder: Path) -> None:
    (folder / FILE).write_text(ENVIRONMENT)


def _read_environment(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    load_environment_file(found, folder)
    return found


def _as_a_shell_reads(found: dict[str, str], expected: Any, folder: Path) -> str | None:
    path = folder / FILE
    if not path.is_symlink() and not path.exists():
        return None if found == {} else "variables out of nothing"
    try:
        words = [word for line in path.read_text().splitlines() for word in shlex.split(line, comments=True)]
    except (OSError, ValueError) as error:
        return f"a shell refuses it ({error})"
    theirs = dict(word.split("=", 1) for word in words if word != "export")
    return None if found == theirs else f"a shell reads {theirs}, we {found}"


def _make_recipe(folder: Path) -> None:
    recipe = yaml.safe_load((ROOT / "launch/recipes/quickstart-student.yaml").read_text())
    recipe["model"]["teacher"] = ["one", "two"]
    recipe["model"]["teacher_weights"] = [1.0, 2.5]
    recipe["optimizer"]["betas"] = [0.9, 0.98]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def _read_recipe(folder: Path) -> dict[str, Any]:
    return flatten(as_tree(parse_config(["--config", str(folder / "recipe.yaml")], "")))


def _as_yaml_says(found: dict[str, Any], expected: Any, folder: Path) -> str | None:
    """Every value of the file has become one of the configuration; the rest are defaults."""
    said = yaml.safe_load((folder / "recipe.yaml").read_text()) or {}
    defaults = flatten(as_tree(parse_config([], "")))
    wanted = {**defaults, **flatten(said)}
    for key in {**found, **wanted}:
        ours, theirs = found.get(key, "?"), wanted.get(key, "?")
        if not _equal(ours, theirs):
            return f"{key} is {ours!r}, the file says {theirs!r}"
    return None


def _equal(ours: Any, theirs: Any) -> bool:
    """YAML 1.1 takes 1e-3 for a word, and jsonargparse a word of digits for a number."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    if ours == theirs:
        return isinstance(ours, bool) == isinstance(theirs, bool)
    if isinstance(ours, bool) or isinstance(theirs, bool):
        return False
    try:
        return float(ours) == float(theirs)
    except (TypeError, ValueError):
        return False


def _make_engine(folder: Path) -> None:
    shutil.copy(ROOT / "ds_configs/fp16.json", folder / "engine.json")


def _read_engine(folder: Path) -> Any:
    resolved = resolve_engine_config(
        read_engine_config(folder / "engine.json"),
        global_batch_size=64,
        micro_batch_size=8,
        gradient_accumulation_steps=8,
        gradient_clipping=1.0,
    )
    return resolved, engine_settings(resolved)


def _as_json_says(found: Any, expected: Any, folder: Path) -> str | None:
    said = json.loads((folder / "engine.json").read_text())
    said.pop("zero_allow_untested_optimizer", None)  # always true: LAMB is none of DeepSpeed's optimizers
    kept = {key: value for key, value in said.items() if value != "auto"}
    wrong = [key for key, value in kept.items() if json.dumps(found[0].get(key)) != json.dumps(value)]
    return f"{wrong} is not what the file says" if wrong else None


TARGETS = (
    Target("hostfile", _make_hostfile, lambda folder: read_hostfile("hostfile"), _as_deepspeed_reads),
    Target("cluster-env", _make_environment, _read_environment, _as_a_shell_reads),
    Target("recipe", _make_recipe, _read_recipe, _as_yaml_says, named=SECTIONS),
    Target("engine-json", _make_engine, _read_engine, _as_json_says, named=("deepspeed.config",)),
)
