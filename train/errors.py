"""Errors that end a run with one plain message and exit code 1: not the user's input, but what happened."""

from __future__ import annotations


class RunError(Exception):
    """Something that ended a run; its text says what, and what to do."""

    others_know = False
    """Whether rank 0 alone meets it, and has let the others hear so (train/heartbeat.py): none asks what it tells."""


class NonFiniteError(RunError):
    """The loss or the gradients stopped being numbers."""


class CheckpointNotWrittenError(RunError):
    """A rank could not write its part (a full disk, say). The checkpoints before are intact."""


class NotMetError(RunError):
    """A rank did not come, cannot be reached, or was lost before the hearts beat (train/heartbeat.py)."""


class LostRankError(RunError):
    """A collective failed because another rank is gone."""

    others_know = True
