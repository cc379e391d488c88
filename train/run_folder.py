"""What a run leaves behind, and how a second start recognises it.

RUN/config.yaml  RUN/ds_config.json   resolved configs, with the versions and the commit
RUN/inputs.json                       digest of the shards' manifest, DeepSpeed's JSON as it was given
RUN/metrics.jsonl  RUN/tensorboard/   train/loop/metrics.py
RUN/rollbacks.json                    train/loop/divergence.py
RUN/checkpoints/step-NNNNNNNN/        train/checkpointing/checkpoint.py
RUN/model/                            train/export/hugging_face.py; RUN/student is a link to it after a distillation
RUN/summary.json                      final figures
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import yaml

from data_prep.shard_format.files import read_file, read_json, try_lock, write_json, write_text
from train.config import Config
from train.errors import UserError, one_line
from train.versions import installed_versions

ROOT = Path(__file__).resolve().parents[1]
MODEL, STUDENT, SUMMARY = "model", "student", "summary.json"
STOPPING = ", stopping"
RESTORE = "restore it, or give another run.dir"
YAML_ERRORS = (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError)
"""Of a damaged text; the last four of ill tags (!!bool x) and of a value that holds itself."""
WATCHING = ("checkpoint.", "run.", "deepspeed.log_level", "data.verify", "data.cache_dir")
"""Keys that say how a run is watched or continued, not what it computes or how it is scored."""
FREE_TO_CHANGE = (*WATCHING, "evaluation.")
"""On resume."""


def provenance() -> dict[str, str]:
    """Python, package versions and the code's commit ("unknown" outside a git checkout)."""
    return {**installed_versions(), "commit": _commit()}


def _commit() -> str:
    if not (ROOT / ".git").exists():  # installed: the folder may lie in another project's checkout
        return "unknown"

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=all")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    # Of untracked files only code counts: Slurm writes a job's output into the first node's copy of the folder alone.
    changed = any(
        not line.startswith("??") or line.endswith((".py", ".c", ".h")) for line in status.splitlines()
    )
    return commit + (" with uncommitted changes" if changed else "")


@contextlib.contextmanager
def hold(
    folder: Path, wait_s: float = 120.0, wait_if_not_stopping_s: float = 3.0
) -> Iterator[Callable[[], None]]:
    """Keep every other job out of a folder; a killed job's hold ends with it.

    Yields:
        What a job calls when it is asked to stop: others then wait for it to save.
    Args:
        wait_s: how long to wait for a job that is stopping.
        wait_if_not_stopping_s: how long for one that is not, or does not know yet that its launcher was killed.
    Raises:
        UserError: another process holds the folder, or it cannot be made or locked.
    """
    path, name = folder / ".lock", f"process {os.getpid()} on {platform.node()}"
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    is_new = not path.exists()
    with _locked(folder, wait_s, wait_if_not_stopping_s) as lock:

        def stopping() -> None:
            # On a full disk others are refused instead of waiting; after the end nobody asks.
            with contextlib.suppress(OSError, ValueError):
                os.write(lock.fileno(), STOPPING.encode())

        try:
            _write_holder(lock, name)
            yield stopping
        except BaseException:  # a refused job leaves nothing behind
            if is_new:
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                for each in missing:
                    each.rmdir()
            raise


def _write_holder(lock: IO[str], name: str) -> None:
    """Without a buffer, which closing the lock would try to write again."""
    try:
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), name.encode())
    except OSError as error:  # which names no file
        raise OSError(error.errno, error.strerror, lock.name) from None


def _locked(folder: Path, wait_s: float, wait_if_not_stopping_s: float) -> IO[str]:
    """FOLDER/.lock, locked, in a folder that is made where it is missing; see `hold`."""
    started, said = time.monotonic(), False
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be used as a folder: {error.strerror}; choose another"
            ) from None
        lock = (folder / ".lock").open("a+")
        while not try_lock(lock):
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            stopping = holder.endswith(STOPPING)
            if time.monotonic() - started > (wait_s if stopping else wait_if_not_stopping_s):
                lock.close()
                raise UserError(
                    f"{folder} is in use by another job ({holder}): wait for its end, stop it, or choose another folder"
                )
            if stopping and not said:
                print(f"waiting for another job ({holder}) to leave {folder}", flush=True)
                said = True
            time.sleep(0.2)
        if os.fstat(lock.fileno()).st_nlink:
            return lock
        lock.close()  # its job was refused, and has removed it


def changed_inputs(run_dir: Path, inputs: Mapping[str, Any]) -> list[str]:
    """A line for each input that is not what the run was started with.

    Args:
        inputs: name -> JSON value: the corpus's digests, DeepSpeed's JSON; kept in RUN/inputs.json by `write_configs`.
    """
    path = run_dir / "inputs.json"
    if not path.exists():
        return []
    before = read_json(path, RESTORE)
    # Runs of before November 2026 have not recorded the token histogram.
    return [f"other contents of {name}" for name, value in inputs.items() if before.get(name, value) != value]


def write_configs(
    run_dir: Path, config: Config, engine_config: Mapping[str, Any], inputs: Mapping[str, Any]
) -> None:
    """Leave both resolved configs, with the versions and the commit, and what they name, in the run folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    header = "".join(f"# {name}: {version}\n" for name, version in provenance().items())
    write_text(run_dir / "config.yaml", header + yaml.safe_dump(as_tree(config), sort_keys=False))
    write_json(run_dir / "ds_config.json", dict(engine_config))
    write_json(run_dir / "inputs.json", dict(inputs))


def recorded_config(run_dir: Path) -> dict[str, Any]:
    """The tree in RUN/config.yaml; empty where there is none."""
    path = run_dir / "config.yaml"
    return _read_yaml(path) if path.exists() else {}


def found_before(run_dir: Path, config: Config) -> Config:
    """`config` with the micro batch that an earlier start of this run found, where it names none."""
    asked = config.training.micro_batch_size
    if isinstance(asked, int):
        return config
    before = recorded_config(run_dir).get("training", {})
    found, of = before.get("micro_batch_size", asked), before.get("global_batch_size")
    if found != asked and not (type(found) is int and found > 0 and (type(of) is not int or of % found == 0)):
        damage = f"training.micro_batch_size: {found!r}"
        raise UserError(f"{run_dir / 'config.yaml'} is damaged ({damage}); {RESTORE}")
    if type(found) is int and config.training.global_batch_size % found:
        return config  # another global batch is asked for
    return dataclasses.replace(config, training=dataclasses.replace(config.training, micro_batch_size=found))


def changed_config(run_dir: Path, config: Config) -> list[str]:
    """`key: old -> new` for each value that differs from the config the run folder was started with, where it matters
    to what is computed."""
    before = recorded_config(run_dir)
    return differing_keys(before, as_tree(config), FREE_TO_CHANGE) if before else []


def differing_keys(before: Mapping[str, Any], now: Mapping[str, Any], free: tuple[str, ...]) -> list[str]:
    """`key: old -> new` for each key that differs and begins with none of `free`.

    Args:
        before, now: configurations as trees of sections. A key that `before` lacks, since older code wrote it, had
            its default.
    """
    old, new = {**flatten(as_tree(Config())), **flatten(before)}, flatten(now)
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in {**old, **new}
        if old.get(key) != new.get(key) and not key.startswith(free)
    ]


def refused_changes(config: Config, changes: Sequence[str]) -> tuple[str, str] | None:
    """What keeps a run from going on, and the remedy; None where it may.

    Args:
        changes: what `changed_config` and `changed_inputs` found. The recipe may allow any but another optimizer,
            to which the state in the checkpoints means nothing.
    """
    for_good = [change for change in changes if change.startswith("optimizer.name: ")]
    if not (for_good or (changes and not config.checkpoint.allow_changed_config)):
        return None
    remedy = "give another run.dir, or restore what was"
    if not for_good:
        remedy = f"{remedy.replace(', or', ',')}, or --checkpoint.allow_changed_config=true to go on anyway"
    lines = "\n  ".join(for_good or changes)
    return f"{config.run.dir} holds a run that was started with another configuration:\n  {lines}", remedy


def refuse_changes(config: Config, changes: Sequence[str]) -> None:
    """UserError where `refused_changes` says so."""
    if (refused := refused_changes(config, changes)) is not None:
        raise UserError("\n".join(refused))


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The final figures, or None where the run has not finished."""
    with contextlib.suppress(FileNotFoundError):
        return read_json(run_dir / SUMMARY, RESTORE)
    return None


def final_model(run_dir: Path) -> Path:
    """Where a run's final Hugging Face folder is, or will be: RUN/model, or RUN/student in runs made before November
    2026, which had no other."""
    before = run_dir / STUDENT
    return before if before.is_dir() and not (run_dir / MODEL).is_dir() else run_dir / MODEL


def link_student(run_dir: Path) -> None:
    """Let RUN/student be a relative link to RUN/model, in place of what is there: a folder of an older version holds
    the weights of an earlier end.

    Called once RUN/model is whole: a kill in between leaves no link, and the next start makes it.
    """
    link, partial = run_dir / STUDENT, run_dir / f".{STUDENT}.partial"
    try:
        partial.unlink(missing_ok=True)
        partial.symlink_to(MODEL, target_is_directory=True)
        if not link.is_symlink():
            shutil.rmtree(link, ignore_errors=True)
        partial.replace(link)
    except OSError as error:  # of a file system without links; the run itself is whole
        print(f"{link} cannot be a link to {MODEL}/: {error.strerror}; use {run_dir / MODEL}", flush=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a configuration that a run has left; UserError naming it where it is damaged."""
    try:
        tree = yaml.safe_load(read_file(path))
    except YAML_ERRORS as error:
        raise UserError(f"{path} is damaged ({one_line(error, 200)}); {RESTORE}") from None
    if not (isinstance(tree, dict) and all(isinstance(section, dict) for section in tree.values())):
        raise UserError(f"{path} is damaged (it does not hold sections of keys); {RESTORE}")
    return tree


def as_tree(config: Config) -> dict[str, Any]:
    """A configuration as a tree of sections, tuples as lists: as YAML and JSON hold it."""
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of sections as {"section.key": value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and f"{prefix}{key}" != "model.scratch":
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
