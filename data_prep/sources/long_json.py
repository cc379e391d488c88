"""The text of one very long JSON line, found without building the line's objects.

json.loads would hold a 300 MB text several times over, at up to four bytes per character. This scanner only
finds where the wanted string lies; LongText then decodes it in pieces. It tells broken JSON by its structure,
not by the last detail of numbers and escapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from data_prep.sources.texts import BOM, BadRecord, LongText

_SPACE = re.compile(rb"[ \t\r\n]*")
_STRING_PART = re.compile(rb'["\\]')
_SCALAR = re.compile(rb"-?[0-9][0-9.eE+-]*|true|false|null")
_BRACKETS = re.compile(rb'["\[\]{}]')


def long_json_text(line: bytes, fields: tuple[str, ...]) -> LongText:
    """The value of the first of `fields` that the JSON object in `line` has.

    Raises:
        BadRecord: the line is no JSON object, has none of the fields, or the field holds no text.
    """
    from data_prep.sources.records import MAX_NAMES, no_such_field

    found: dict[str, tuple[int, int]] = {}
    names: list[str] = []
    for name, start, end in _members(line):
        if name in fields:
            found[name] = start, end
        elif len(names) < MAX_NAMES:  # a line may have millions
            names.append(name)
    for field in fields:
        if field in found:
            start, end = found[field]
            if line[start : start + 1] != b'"':
                raise BadRecord(f"the field {field!r} does not hold a text")
            return LongText(line, start + 1, end - 1, json=True)
    raise no_such_field(fields, names)


def _members(line: bytes) -> Iterator[tuple[str, int, int]]:
    """Each member of the object: its name and where its value starts and ends."""
    at = _skip_space(line, len(BOM) if line.startswith(BOM) else 0)
    at = _expect(line, at, b"{")
    if line[at : at + 1] == b"}":
        _end_of_line(line, at + 1)
        return
    while True:
        end = _string_end(line, at)
        try:
            name = json.loads(line[at:end])
        except ValueError:
            raise BadRecord(f"not valid JSON (a field's name at offset {at})") from None
        start = _expect(line, _skip_space(line, end), b":")
        end = _value_end(line, start)
        yield name, start, end
        at = _skip_space(line, end)
        if line[at : at + 1] == b"}":
            _end_of_line(line, at + 1)
            return
        at = _expect(line, at, b",")


def _skip_space(line: bytes, at: int) -> int:
    match = _SPACE.match(line, at)
    assert match is not None
    return match.end()


def _expect(line: bytes, at: int, mark: bytes) -> int:
    """The offset of what follows `mark` and white space."""
    if line[at : at + 1] != mark:
        raise BadRecord(f"not valid JSON (expected {mark.decode()!r} at offset {at})")
    return _skip_space(line, at + 1)


def _end_of_line(line: bytes, at: int) -> None:
    if _skip_space(line, at) != len(line):
        raise BadRecord(f"not valid JSON (extra data at offset {at})")


def _string_end(line: bytes, at: int) -> int:
    if line[at : at + 1] != b'"':
        raise BadRecord(f"not valid JSON (expected a string at offset {at})")
    start = at
    at += 1
    while match := _STRING_PART.search(line, at):
        if match.group() == b'"':
            return match.end()
        at = match.end() + 1
    raise BadRecord(f"not valid JSON (the string that starts at offset {start} has no end)")


def _value_end(line: bytes, at: int) -> int:
    first = line[at : at + 1]
    if first == b'"':
        return _string_end(line, at)
    if first in (b"{", b"["):
        return _nested_end(line, at)
    match = _SCALAR.match(line, at)
    if match is None:
        raise BadRecord(f"not valid JSON (expected a value at offset {at})")
    return match.end()


def _nested_end(line: bytes, at: int) -> int:
    start, depth = at, 0
    while match := _BRACKETS.search(line, at):
        at = match.end()
        if match.group() == b'"':
            at = _string_end(line, match.start())
        else:
            depth += 1 if match.group() in b"[{" else -1
            if depth == 0:
                return at
    raise BadRecord(f"not valid JSON (what opens at offset {start} is not closed)")
