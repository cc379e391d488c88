"""What the readers of all formats share: the files they read, the options, and the records they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_prep.shard_format.errors import UserError
from data_prep.sources.texts import BadRecord

MAX_DOCUMENT_MB = 64
MAX_NAMES = 20
"""So many of the fields that there are does a message name."""
_LINE_BREAK = 2
"""Bytes at the end of a record that do not count as its document's."""


@dataclass(frozen=True)
class SourceFile:
    """One input: a file, rows of a table in it, or a part of a stream."""

    path: str
    format: str
    bytes: int
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class ReadOptions:
    text_fields: tuple[str, ...] = ("text",)
    """The first of these that a record has is its text."""
    max_document_mb: int = MAX_DOCUMENT_MB
    """Of UTF-8, 10**6 bytes each; a longer document is a bad record."""

    @property
    def max_document_bytes(self) -> int:
        return self.max_document_mb * 1_000_000

    @property
    def max_text_record(self) -> int:
        """Bytes of a record that is nothing but text."""
        return self.max_document_bytes + _LINE_BREAK

    @property
    def max_json_record(self) -> int:
        """Bytes of a JSON line: its escapes are longer than the characters, and there are other fields."""
        return 2 * self.max_document_bytes + _LINE_BREAK

    def too_long(self) -> BadRecord:
        return BadRecord(
            f"a document of more than {self.max_document_mb} MB (raise --max-document-mb, or split it; "
            "of .txt files --txt-documents says what a document is)"
        )


def text_fields(names: str) -> tuple[str, ...]:
    """The fields that `--text-field` names, separated by commas; UserError where it names none."""
    fields = tuple(name.strip() for name in names.split(",") if name.strip())
    if not fields:
        raise UserError(f"--text-field {names!r}: names no field")
    return fields


def check_max_document_mb(value: int) -> None:
    if not 1 <= value <= 2000:
        raise UserError(f"--max-document-mb {value}: must be between 1 and 2000")


class Record(NamedTuple):
    """`place` completes "PATH, ..." in a message; `size` in bytes decides where a chunk of work ends."""

    place: str
    payload: Any
    size: int


class Reading:
    """Where a reader is: `position()` in bytes of the stored file."""

    def __init__(self) -> None:
        self.position: Callable[[], int] = lambda: 0


def no_such_field(wanted: tuple[str, ...], there: list[str]) -> BadRecord:
    names = " or ".join(map(repr, wanted))
    fields = ", ".join(map(repr, there[:MAX_NAMES])) or "none"
    return BadRecord(f"no text field {names}; the fields are {fields} (choose with --text-field)")
