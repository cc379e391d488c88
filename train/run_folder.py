"""What a run leaves behind, and how a second start recognises it.

RUN/config.yaml  RUN/ds_config.json   resolved configs, with the versions and the commit
RUN/metrics.jsonl  RUN/tensorboard/   train/metrics.py
RUN/checkpoints/step-NNNNNNNN/        train/checkpoint.py
RUN/student/                          train/export.py
RUN/summary.json                      final figures
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from train.config import Config

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "webdataset", "numpy")
# These say how a run is watched or continued, not what it computes: they may change on resume.
FREE_TO_CHANGE = (
    "checkpoint.",
    "run.",
    "deepspeed.log_level",
    "data.verify",
    "data.cache_dir",
    "evaluation.",
)


def provenance() -> dict[str, str]:
    """Python, package versions and the code's commit ("unknown" outside a git checkout)."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions, "commit": _commit()}


def _commit() -> str:
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        changed = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + (" with uncommitted changes" if changed.strip() else "")


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader finds the old file or the whole new one, also after a crash."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep every other job out of a folder; a killed job's hold ends with it.

    Raises:
        ValueError: another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise ValueError(
                f"{folder} is in use by another job ({holder}): wait for its end, stop it, or choose another folder"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        yield


def write_configs(run_dir: Path, config: Config, engine_config: Mapping[str, Any]) -> None:
    """Leave both resolved configs, with the versions and the commit, in the run folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    header = "".join(f"# {name}: {version}\n" for name, version in provenance().items())
    write_atomically(run_dir / "config.yaml", header + yaml.safe_dump(_plain(config), sort_keys=False))
    write_json(run_dir / "ds_config.json", dict(engine_config))


def refuse_changed_config(run_dir: Path, config: Config) -> None:
    """ValueError naming each key whose value differs from the config the run folder was started with."""
    path = run_dir / "config.yaml"
    if not path.exists():
        return
    before, now = flatten(yaml.safe_load(path.read_text())), flatten(_plain(config))
    changes = [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in {**before, **now}
        if before.get(key) != now.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]
    if changes:
        raise ValueError(
            f"{run_dir} holds a run that was started with another configuration:\n  "
            + "\n  ".join(changes)
            + "\ngive another run.dir, the old values, or --checkpoint.allow_changed_config=true to go on anyway"
        )


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The final figures, or None where the run has not finished."""
    with contextlib.suppress(FileNotFoundError):
        return json.loads((run_dir / "summary.json").read_text())
    return None


def _plain(config: Config) -> Any:
    """Dataclasses to dicts and tuples to lists, as YAML and JSON hold them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of sections as {"section.key": value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and f"{prefix}{key}" != "model.scratch":
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
