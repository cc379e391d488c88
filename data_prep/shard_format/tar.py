"""A strict reader of the tars that data_prep and webdataset's TarWriter write.

Python's tarfile follows whatever a tar may hold: chains of long-name headers recurse until the stack ends,
headers of digits cost quadratic time, sparse members and links lead elsewhere. A shard needs plain files of
short names alone, so this walk over 512-byte headers (POSIX.1-2001, "ustar Interchange Format") takes those,
in time proportional to the file's size, and refuses everything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from data_prep.shard_format.errors import UserError

_BLOCK = 512
_LARGEST_PAX_HEADER = 4096
_OCTAL = re.compile(rb" *([0-7]{1,11})[ \0]*")
_PAX_RECORD = re.compile(rb"([1-9][0-9]{0,3}) ([^=\n]{1,100})=")
# What a writer may tell of a file beside its name, its size and its bytes.
_HARMLESS = {b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname"}


class Member(NamedTuple):
    """A plain file in a tar."""

    name: str
    start: int
    """Where its content begins, bytes from the beginning of the tar."""
    stop: int


def tar_members(data: bytes | bytearray) -> Iterator[Member]:
    """The plain files of a tar, in order.

    A POSIX extended header ("x") of times and owners may stand before a member, as TarWriter makes them
    for fractions of a second with format="PAX_FORMAT".

    Raises:
        UserError: anything else is in it, a checksum is wrong, or it does not end as a tar does.
    """
    offset, described = 0, False
    while True:
        header = bytes(data[offset : offset + _BLOCK])
        if len(header) < _BLOCK:
            raise UserError("it ends without a tar's end mark")
        if not any(header):
            break
        name, kind, size = _parse(header)
        start = offset + _BLOCK
        if start + size > len(data):
            raise UserError(f"member {name!r} ends beyond the file")
        if kind == b"x":
            if described:
                raise UserError(f"two extended headers stand before one member, at {name!r}")
            _check_pax(name, bytes(data[start : start + min(size, _LARGEST_PAX_HEADER + 1)]))
        elif kind in (b"0", b"\0"):
            yield Member(name, start, start + size)
        else:
            raise UserError(f"member {name!r} is not a plain file but of tar's type {kind!r}")
        described = kind == b"x"
        offset = start + -(-size // _BLOCK) * _BLOCK
    if described or data.count(0, offset) != len(data) - offset:
        raise UserError("something else than zeros stands behind its end mark")


def _parse(header: bytes) -> tuple[str, bytes, int]:
    """Name, type and size."""
    if header[257:262] != b"ustar":
        raise UserError("it is not a tar of the ustar kind")
    if _octal(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise UserError("the checksum of a tar header is wrong")
    name, prefix = (_text(field) for field in (header[:100], header[345:500]))
    return f"{prefix}/{name}" if prefix else name, header[156:157], _octal(header[124:136])


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("ascii", "backslashreplace")


def _octal(field: bytes) -> int:
    digits = _OCTAL.fullmatch(field)
    if digits is None:
        raise UserError(f"a tar header has {field!r} where a number should be")
    return int(digits[1], 8)


def _check_pax(name: str, body: bytes) -> None:
    """Records of the form "LENGTH KEY=VALUE\\n", LENGTH counting all of it."""
    if len(body) > _LARGEST_PAX_HEADER:
        raise UserError(f"the extended header {name!r} is longer than {_LARGEST_PAX_HEADER} bytes")
    offset = 0
    while offset < len(body):
        record = _PAX_RECORD.match(body, offset)
        stop = offset + int(record[1]) if record else 0
        if record is None or stop <= record.end() or body[stop - 1 : stop] != b"\n":
            raise UserError(f"the extended header {name!r} is damaged")
        if record[2] not in _HARMLESS:
            raise UserError(f"the extended header {name!r} sets {record[2]!r}: that is not a plain file")
        offset = stop
