"""Files to records, records to documents. Every format is a pair of functions in FORMATS:

`read` splits a file into raw records and does as little else as it can, since several processes may read the
same file and take turns in working on its parts; `parse` makes one record's text and may find it bad.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_prep.shard_format.errors import UserError
from data_prep.sources.streams import open_stream
from data_prep.sources.texts import BOM, LONG, BadRecord, LongText, Text, decode, text_of

MAX_RECORD_BYTES = 1 << 29
"""A longer document is an error: it is beyond what is promised about memory, and is rarely one document."""
MAX_NAMES = 20
"""So many of the fields that there are does a message name."""


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


def text_fields(names: str) -> tuple[str, ...]:
    """The fields that `--text-field` names, separated by commas; ValueError where it names none."""
    fields = tuple(name.strip() for name in names.split(",") if name.strip())
    if not fields:
        raise UserError(f"--text-field {names!r}: names no field")
    return fields


class Record(NamedTuple):
    """`place` completes "PATH, ..." in a message; `size` in bytes decides where a chunk of work ends."""

    place: str
    payload: Any
    size: int


class Reading:
    """Where a reader is: `position()` in bytes of the stored file."""

    def __init__(self) -> None:
        self.position: Callable[[], int] = lambda: 0


def _lines(stream: Any, path: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := stream.readline(MAX_RECORD_BYTES + 1):
        number += 1
        _check_size(len(line), path, f"line {number}")
        yield number, line


def _check_size(size: int, path: str, place: str) -> None:
    if size > MAX_RECORD_BYTES:
        raise UserError(
            f"{path}, {place}: a document of more than {MAX_RECORD_BYTES >> 20} MiB; split it, or read the "
            "file by lines or blocks (--txt-documents)"
        )


def read_file_as_one(file: SourceFile, options: ReadOptions, reading: Reading) -> Iterator[Record]:
    with open_stream(file.path) as opened:
        reading.position = opened.position
        data = bytearray()  # grows in place; one read would reserve the largest size there may be
        while part := opened.stream.read(1 << 20):
            data += part
            _check_size(len(data), file.path, "the whole file")
        yield Record("", data, len(data))


def read_lines(file: SourceFile, options: ReadOptions, reading: Reading) -> Iterator[Record]:
    with open_stream(file.path) as opened:
        reading.position = opened.position
        for number, line in _lines(opened.stream, file.path):
            if not line.isspace():
                yield Record(f"line {number}", line, len(line))


def read_blocks(file: SourceFile, options: ReadOptions, reading: Reading) -> Iterator[Record]:
    with open_stream(file.path) as opened:
        reading.position = opened.position
        block: list[bytes] = []
        start, size = 1, 0
        for number, line in _lines(opened.stream, file.path):
            if not line.isspace():
                if not block:
                    start = number
                block.append(line)
                size += len(line)
                _check_size(size, file.path, f"line {start}")
            elif block:
                yield Record(f"line {start}", b"".join(block), size)
                block, size = [], 0
        if block:
            yield Record(f"line {start}", b"".join(block), size)


def read_wiki(file: SourceFile, options: ReadOptions, reading: Reading) -> Iterator[Record]:
    """WikiExtractor's output: `<doc id=...>` lines, text, `</doc>`; or, with its --json, JSON lines."""
    with open_stream(file.path) as opened:
        reading.position = opened.position
        inside: list[bytes] | None = None
        start, size = 1, 0
        for number, line in _lines(opened.stream, file.path):
            if inside is None:
                if line.startswith(b"<doc "):
                    inside, start, size = [], number, 0
                elif not line.isspace():
                    yield Record(f"line {number}", line, len(line))
            elif line.startswith(b"</doc>"):
                yield Record(f"line {start}", (b"".join(inside),), size)
                inside = None
            else:
                inside.append(line)
                size += len(line)
                _check_size(size, file.path, f"line {start}")
        if inside is not None:
            yield Record(f"line {start}", None, size)


def parse_text(record: Record, options: ReadOptions) -> Text:
    return text_of(record.payload)


def parse_wiki(record: Record, options: ReadOptions) -> Text:
    if isinstance(record.payload, tuple):
        return text_of(record.payload[0])
    if record.payload is None:
        raise BadRecord("a <doc> without its </doc>")
    if not record.payload.startswith(b"{"):
        raise BadRecord("text outside <doc> ... </doc>, as WikiExtractor writes it")
    return parse_json(record, options)


def parse_json(record: Record, options: ReadOptions) -> Text:
    line = record.payload
    if len(line) >= LONG:
        from data_prep.sources.long_json import long_json_text

        return long_json_text(line, options.text_fields)
    text = decode(line).rstrip()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRecord(f"not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno})") from None
    except RecursionError:
        raise BadRecord("not valid JSON (nested too deeply)") from None
    if not isinstance(content, dict):
        raise BadRecord(f"a JSON {type(content).__name__} where an object with the text was expected")
    for field in options.text_fields:
        if field in content:
            value = content[field]
            if isinstance(value, str):
                return value
            raise BadRecord(f"the field {field!r} holds {_json_type(value)}, not a text")
    raise no_such_field(options.text_fields, list(content))


def no_such_field(wanted: tuple[str, ...], there: list[str]) -> BadRecord:
    names = " or ".join(map(repr, wanted))
    fields = ", ".join(map(repr, there[:MAX_NAMES])) or "none"
    return BadRecord(f"no text field {names}; the fields are {fields} (choose with --text-field)")


def _json_type(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")


def _read_table(file: SourceFile, options: ReadOptions, reading: Reading) -> Iterator[Record]:
    from data_prep.sources.tables import FORMATS as tables

    return tables[file.format](file, options, reading)


def _read_docstrings(file: SourceFile, options: ReadOptions, reading: Reading) -> Iterator[Record]:
    from data_prep.sources.installed_docs import read_docstrings

    return read_docstrings(file, options, reading)


def parse_cell(record: Record, options: ReadOptions) -> Text:
    if record.payload is None:
        raise BadRecord("the text is null")
    return text_of(record.payload)


def parse_ready(record: Record, options: ReadOptions) -> Text:
    text: str = record.payload
    return text


Read = Callable[[SourceFile, ReadOptions, Reading], Iterator[Record]]
FORMATS: dict[str, tuple[Read, Callable[[Record, ReadOptions], Text]]] = {
    "file": (read_file_as_one, parse_text),
    "line": (read_lines, parse_text),
    "block": (read_blocks, parse_text),
    "jsonl": (read_lines, parse_json),
    "wiki": (read_wiki, parse_wiki),
    "parquet": (_read_table, parse_cell),
    "dataset": (_read_table, parse_cell),
    "hub": (_read_table, parse_cell),
    "installed-docs": (_read_docstrings, parse_ready),
}
SPLITTABLE = ("line", "block", "jsonl", "wiki")
"""Formats whose records are found much faster than worked on: processes may share one file."""


__all__ = ["BOM", "FORMATS", "SPLITTABLE", "LongText", "ReadOptions", "Reading", "Record", "SourceFile"]
