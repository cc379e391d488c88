"""`cluster.env`: environment variables for every rank on every host, under every launcher.

`deepspeed --hostfile` hands on only a few variables of the shell that it is typed in. DeepSpeed's own way, a file
.deepspeed_env, ends the launcher with a traceback at an empty line or a comment, is not read on a single host, and
takes quotes and `export` literally. This file is read by each rank itself, from its working directory: under all
launchers the one that the command is typed in, so that jobs in different folders may have files of their own. The
doctor reads it there too.

    # a comment; empty lines, `export` and quotes are fine
    HF_HOME=/scratch/hf
    export HTTPS_PROXY="http://proxy:3128"

Variables that are already set keep their values.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import MutableMapping
from pathlib import Path

from train.errors import UserError
from train.text_files import read_utf8

FILE = "cluster.env"
BY_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CUDA_VISIBLE_DEVICES")
TOO_LATE = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "PYTHONHOME")


def load_environment_file(environment: MutableMapping[str, str] = os.environ, folder: Path = Path()) -> None:
    """Add what folder/cluster.env says, if there is one.

    Raises:
        UserError: a line that is not NAME=value, a variable that would have no effect, no UTF-8, a folder.
    """
    path = folder / FILE
    if path.is_dir():
        raise UserError(f"{path} is a folder; rename it: ranks read a file of NAME=value lines of that name")
    if path.is_file():
        for name, value in parse_environment(read_utf8(path, str(path)), str(path)).items():
            environment.setdefault(name, value)


def parse_environment(text: str, where: str = FILE) -> dict[str, str]:
    """Name -> value; ValueError as above."""
    variables = {}
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            words = [] if line.lstrip().startswith("#") else _before_comment(shlex.split(line))
        except ValueError as error:
            raise UserError(f"{where}, line {number}: {str(error).lower()} in {line!r}") from None
        for word in words[1:] if words[:1] == ["export"] else words:
            name, equals, value = word.partition("=")
            if not (equals and name.isidentifier()):
                raise UserError(
                    f"{where}, line {number}: {word!r} is not NAME=value; quote values with blanks, put no blank "
                    "around ="
                )
            if name in BY_LAUNCHER:
                raise UserError(f"{where}, line {number}: {name} is the launcher's to set; remove it")
            if name in TOO_LATE:
                raise UserError(
                    f"{where}, line {number}: {name} has no effect here, where Python runs already: set it in the "
                    "hosts' ~/.bashrc"
                )
            variables[name] = value
    return variables


def _before_comment(words: list[str]) -> list[str]:
    comments = [place for place, word in enumerate(words) if word.startswith("#")]
    return words[: comments[0]] if comments else words
