"""C loops, built on first use by the machine's own compiler (a tenth of a second).

Nothing is compiled at install time. A library is built anew by each process, for its own processor, in a temporary
folder: nothing stale or foreign is ever loaded.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

# -ffp-contract=off keeps each element's rounding the same in vector bodies and scalar tails.
FLAGS = ("-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno")
# gcc's OpenMP is found in torch's own library of it, which is loaded before and open to all. clang brings another one,
# whose threads compete with torch's.
THREADS = (("-fopenmp",), ())
TUNING = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ())


def compile_library(
    source: Path, functions: Mapping[str, Sequence[Any]], options: Sequence[str] = ()
) -> ctypes.CDLL | None:
    """The compiled file with all these functions in it, or None where no C compiler is found or it fails.

    Args:
        functions: name -> ctypes of its arguments; none returns anything.
        options: of the compiler, after FLAGS.
    """
    try:
        compiler = _compiler()
        return _compile(compiler, source, functions, options) if compiler else None
    except (OSError, ValueError):  # no temporary folder; a CC with one quotation mark
        return None


def _compiler() -> list[str]:
    """The words of a command: CC as a shell would take it, or a path with blanks; [] where there is none."""
    given = os.environ.get("CC", "").strip()
    if given:
        return [given] if shutil.which(given) else shlex.split(given)
    found = (shutil.which(name) for name in ("cc", "gcc", "clang"))
    return next(([path] for path in found if path), [])


def _compile(
    compiler: list[str], source: Path, functions: Mapping[str, Sequence[Any]], options: Sequence[str]
) -> ctypes.CDLL | None:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, f"{source.stem}.so")
        for flags in itertools.product(THREADS, TUNING):
            own = (*FLAGS, *options, *itertools.chain(*flags))
            command = [*compiler, *own, "-o", str(library), str(source), "-lm"]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                loaded = ctypes.CDLL(str(library))
                for name, arguments in functions.items():
                    function = getattr(loaded, name)
                    function.restype, function.argtypes = None, arguments
            except (OSError, AttributeError, subprocess.SubprocessError):
                continue  # AttributeError: what was built is not ours
            return loaded
    return None


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


def num_threads() -> int:
    """Of the loops: as many as torch has, but one in a process that has come of a fork: OpenMP's threads do not survive
    it, and a child that counted on them would wait for ever."""
    return 1 if _forked else torch.get_num_threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
