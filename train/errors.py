"""What ends a command, by who can mend it. launch/common/cli.py turns it into one line and an exit code."""

from __future__ import annotations

import errno
import pickle
import re

from data_prep.shard_format.errors import UserError as UserError

BAD_USAGE = 2
BAD_PATHS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def one_line(error: BaseException, longest: int = 300) -> str:
    """A library's message on one line, cut to `longest` characters; the error's name where it has none."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


def refused_pickle(error: BaseException) -> str | None:
    """What to say of a file that torch.load refused with `weights_only`, after its name; None for another error.

    torch's own text advises to load it without.
    """
    text = str(error)
    if not isinstance(error, pickle.UnpicklingError) and "TorchScript" not in text:
        return None
    named = re.search(r"GLOBAL ([\w.]+)", text)
    return (
        f"names {named[1]}" if named else "is no archive of tensors"
    ) + ": no code of such a file is run here. Remove it, and take one from somebody you trust"


def exit_code(error: BaseException | None) -> int:
    """2 where the user's input or paths are at fault, 1 for anything else."""
    return BAD_USAGE if isinstance(error, (UserError, *BAD_PATHS)) else 1


class RankError(UserError):
    """The fault of one rank's host or launcher: its variables, GPUs, network. The others may be without it."""


class RunError(Exception):
    """Something that ended a run; its text says what, and what to do. Exit code 1."""


class NonFiniteError(RunError):
    """The loss or the gradients stopped being numbers."""


class OutOfMemoryError(RunError):
    """A device, or the host, has no memory left."""


class CheckpointNotWrittenError(RunError):
    """A rank could not write its part (a full disk, say). The checkpoints before are intact."""


class RendezvousError(RunError):
    """A rank did not come, cannot be reached, or was lost before training began."""


class LostRankError(RunError):
    """A collective failed, mostly because another rank is gone."""


class ReportedElsewhereError(Exception):
    """Another rank reports; this one ends without a word, with the exit code of the error that this is raised from."""
