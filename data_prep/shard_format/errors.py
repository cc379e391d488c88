"""The error that is the user's to mend."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """A bad value, file or folder of the user's; the text names it, says what is wrong and what to do.

    Raised where user input is judged. launch/common/cli.py prints its text alone and exits with 2; every other
    ValueError is a defect, and keeps its traceback.
    """


def refuse_empty_words(arguments: Sequence[str]) -> None:
    """UserError where a word of a command line, or what stands behind its =, is empty, as of a variable not set.

    As a path it would mean the current folder.
    """
    for before, word in zip(("", *arguments), arguments, strict=False):
        if not word.strip():
            raise UserError(f"{before} {word!r}: is empty; give a value, or leave it out".strip())
        if word.startswith("-") and word.endswith("="):
            raise UserError(f"{word}: is empty; give a value, or leave it out")


class MissingFile(UserError, FileNotFoundError):
    """A file that the user named, or that belongs to a folder of theirs, is not there."""
