"""Errors that end a run with one plain message and exit code 1: not the user's input, but what happened. And how the
errors of libraries are told."""

from __future__ import annotations

from data_prep.shard_format.errors import UserError as UserError


def one_line(error: BaseException, longest: int = 300) -> str:
    """A library's message on one line, cut to `longest` characters; the error's name where it has none."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


class RunError(Exception):
    """Something that ended a run; its text says what, and what to do."""

    others_know = False
    """Whether rank 0 alone meets it and has let the others know (train/distributed/heartbeat.py)"""


class NonFiniteError(RunError):
    """The loss or the gradients stopped being numbers."""


class CheckpointNotWrittenError(RunError):
    """A rank could not write its part (a full disk, say). The checkpoints before are intact."""


class NotMetError(RunError):
    """A rank did not come, cannot be reached, or was lost before the hearts beat (train/distributed/heartbeat.py)."""


class LostRankError(RunError):
    """A collective failed because another rank is gone."""

    others_know = True
