"""What a class of inputs is to the fuzzers: how whole ones are made, read and compared; what an outcome is worth."""

from __future__ import annotations

import os
import random
import re
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.error_messages import exit_code as data_prep_exit_code
from launch.common.cli import is_plain
from tests.fuzzing.mutators import KINDS, damage
from train.errors import RunError, UserError

GOOD = ("accepted", "refused")
BAD = ("raw", "silent", "hung")
NOTHING = "nothing"
REMEDY = re.compile(
    r"is not `|there is no|does not exist|did you mean|this trainer runs|this project ships|needed|\[Errno|"
    r"\b(give|write|remove|delete|restore|run|fetch|make|set|use|choose|save|start|rename|raise|leave|move|add|pack|put|"
    r"copy|export|must|needs?|wants?|try|mend|correct|fill|replace|point|measure|see)\b"
)


def same(value: Any, expected: Any, folder: Path) -> str | None:
    """For inputs whose damage the format can detect: nothing else than the undamaged result will do."""
    return None if value == expected else "it was read as something else"


def anything(value: Any, expected: Any, folder: Path) -> str | None:
    """For inputs in which another value is as valid."""
    return None


@dataclass(frozen=True)
class Target:
    """One class of inputs."""

    name: str
    make: Callable[[Path], object]
    """Writes a whole input into an empty folder."""
    read: Callable[[Path], Any]
    """What the commands do with it. The working directory is the folder, and so is the argument, as Path()."""
    judge: Callable[[Any, Any, Path], str | None] = same
    """(what was read, what was read of the undamaged one, the folder) -> what is wrong with it, or None."""
    damaged: tuple[str, ...] = ("**/*",)
    """Globs of the files that are damaged."""
    named: tuple[str, ...] = ()
    """What a message may name in place of a file."""
    kinds: tuple[str, ...] = KINDS
    """Of damage."""
    timeout_s: float = 60.0
    is_data_prep: bool = False
    """Whether a command of data_prep/ reads it, which has its own way to print errors."""


@dataclass(frozen=True)
class Outcome:
    """What became of one damaged input."""

    kind: str
    """One of GOOD and BAD."""
    what: str
    """The damage."""
    text: str
    """The message, or what is wrong."""


def damage_folder(target: Target, seed: int, pristine: Path, folder: Path) -> str:
    """Copy an input and damage one file of the copy; what was done. Seed 0 damages nothing."""
    shutil.copytree(pristine, folder, symlinks=True)
    rng = random.Random(f"{target.name}/{seed}")
    files = sorted({path for glob in target.damaged for path in folder.glob(glob) if path.is_file()})
    return damage(rng, folder, rng.choice(files), target.kinds) if seed else NOTHING


def outcome_of(target: Target, what: str, pristine: Path, folder: Path, expected: Any) -> Outcome:
    """Read a damaged input and judge what came of it. The working directory changes."""
    os.chdir(folder)
    try:
        value = target.read(Path())
    except (UserError, RunError, OSError) as error:
        fault = (
            "the undamaged input is refused"
            if what == NOTHING
            else _fault_of_message(target, error, pristine)
        )
        text = f"{fault}\n{traceback.format_exc()}" if fault else str(error)
        return Outcome("raw" if fault else "refused", what, text)
    except BaseException:
        return Outcome("raw", what, traceback.format_exc())
    try:
        fault = target.judge(value, expected, Path())
    except Exception as error:
        fault = f"it was read, and the reference refuses it: {error!r}"
    return Outcome("silent" if fault else "accepted", what, fault or "")


def try_once(target: Target, seed: int, pristine: Path, folder: Path, expected: Any) -> Outcome:
    """One damaged input from beginning to end; the folder stays where the outcome is bad."""
    outcome = outcome_of(target, damage_folder(target, seed, pristine, folder), pristine, folder, expected)
    if outcome.kind in GOOD:
        shutil.rmtree(folder)
    return outcome


def _fault_of_message(target: Target, error: Exception, pristine: Path) -> str | None:
    """What a user would miss in a message, or None."""
    plain = data_prep_exit_code(error) == 2 if target.is_data_prep else is_plain(error)
    if not plain:
        return "an OSError that does not say of which file"
    text = str(error)
    names = {path.name for path in pristine.rglob("*")} | {path.stem for path in pristine.rglob("*")}
    if not any(name in text for name in {*names, *target.named}):
        return "it names no file"
    if not isinstance(error, OSError) and not REMEDY.search(text):
        return "it names no remedy"
    return None
