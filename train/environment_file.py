"""`cluster.env`: environment variables for every rank on every host, under every launcher.

`deepspeed --hostfile` hands on only a few variables of the shell that it is typed in. DeepSpeed's own way, a file
.deepspeed_env, ends the launcher with a traceback at an empty line or a comment, is not read on a single host, and
takes quotes and `export` literally. This file is read by each rank itself, from its working directory: under all
launchers the one that the command is typed in, so that jobs in different folders may have files of their own. The
doctor reads it there too.

    # a comment; empty lines, `export` and quotes are fine
    HF_HOME=/scratch/hf
    export HTTPS_PROXY="http://proxy:3128"

`$` and `~`, which a shell would expand, are refused where single quotes do not say that they stand for themselves.
Variables that are already set keep their values.
"""

from __future__ import annotations

import io
import os
from collections.abc import MutableMapping
from pathlib import Path

from dotenv.parser import parse_stream

from data_prep.shard_format.files import read_file
from train.errors import UserError

FILE = "cluster.env"
BY_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CUDA_VISIBLE_DEVICES")
TOO_LATE = (
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"),
    *("PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED"),
)


def load_environment_file(environment: MutableMapping[str, str] = os.environ, folder: Path = Path()) -> None:
    """Add what folder/cluster.env says, if there is one.

    Raises:
        UserError: a line that is not NAME=value, a variable that would have no effect, no UTF-8, a folder.
        OSError: it cannot be read.
    """
    path = folder / FILE
    if path.is_dir():
        raise UserError(f"{path} is a folder; rename it: ranks read a file of NAME=value lines of that name")
    if path.exists() or path.is_symlink():  # a link to nothing is a fault, no file is none
        for name, value in parse_environment(read_utf8(path, str(path)), str(path)).items():
            environment.setdefault(name, value)


def parse_environment(text: str, where: str = FILE) -> dict[str, str]:
    """Name -> value; UserError as above."""
    if text.startswith("\ufeff"):
        raise UserError(f"{where} begins with a byte order mark; save it without")
    variables = {}
    for number, line in enumerate(text.splitlines(), start=1):
        for found in parse_stream(io.StringIO(line)):
            name, value = found.key, found.value
            if name is None and not found.error:  # a comment or an empty line
                continue
            quote = line.partition("=")[2].lstrip()[:1]
            unquoted = quote not in ("'", '"')
            unclear = unquoted and value is not None and any(letter in value for letter in " \t'\"\\")
            if name is None or value is None or unclear or not name.isidentifier():
                raise UserError(
                    f"{where}, line {number}: {line.strip()!r} is not NAME=value; quote a value with blanks, quotes or "
                    "backslashes, and give each variable a line"
                )
            if ("$" in value and quote != "'") or (unquoted and value.startswith("~")):
                raise UserError(
                    f"{where}, line {number}: {line.strip()!r}: nothing is expanded here; write the value out, or put "
                    "it in single quotes where $ and ~ stand for themselves"
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


def read_utf8(path: Path, name: str) -> str:
    """Text of a file that a user writes by hand.

    Args:
        name: what a message calls it, such as the flag that gave it.
    Raises:
        UserError: it is not UTF-8, or a named pipe.
        OSError: it cannot be read.
    """
    try:
        return read_file(path).decode()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{name} is not UTF-8 (byte 0x{byte:02x} at offset {error.start}); save it as UTF-8 text"
        ) from None
