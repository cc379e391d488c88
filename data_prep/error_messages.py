"""What the three commands share: how they parse, and how their errors reach the user."""

from __future__ import annotations

import argparse
import errno
import sys
import traceback

from data_prep.processes import ProcessLost
from data_prep.shard_format.errors import UserError, refuse_empty_words


def parse_words(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The command line (None: the process's own), without empty words."""
    try:
        refuse_empty_words(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        parser.error(str(error))
    return parser.parse_args(arguments)


def _is_full_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def exit_code(error: Exception) -> int:
    """2 for bad usage or input; 1 for what no other command line would mend: a full disk, a fault of ours."""
    return 2 if isinstance(error, (UserError, OSError)) and not _is_full_disk(error) else 1


def explain(error: Exception) -> str:
    """One line for what a user can mend; the traceback for what is a fault of this code."""
    if _is_full_disk(error):
        assert isinstance(error, OSError)
        return (
            f"{error.filename or 'a temporary file (TMPDIR)'}: {error.strerror}: the disk is full (the output needs "
            "about 4 bytes per token, 2 of them for the time of the run); make room and run the same command again: "
            "finished work is kept"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (UserError, OSError, ProcessLost)):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()
