"""The error that is the user's to mend."""

from __future__ import annotations


class UserError(ValueError):
    """A bad value, file or folder of the user's; the text names it, says what is wrong and what to do.

    Raised where user input is judged. launch/cli.py prints its text alone and exits with 2; every other ValueError is
    a defect, and keeps its traceback.
    """


class MissingFile(UserError, FileNotFoundError):
    """A file that the user named, or that belongs to a folder of theirs, is not there."""
