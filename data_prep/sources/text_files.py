"""Text files, JSON lines and WikiExtractor's output: files to records, records to texts.

A reader keeps no more of a record than its parser needs to find it too long, so that the memory of a process
does not depend on what a file holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from data_prep.sources.records import Reading, ReadOptions, Record, SourceFile, no_such_field
from data_prep.sources.streams import open_stream
from data_prep.sources.texts import BadRecord, decode


def _lines(stream: Any, limit: int) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers; of one longer than `limit`, its first `limit` + 1 bytes."""
    number = 0
    while line := stream.readline(limit + 1):
        number += 1
        rest = line
        while len(line) > limit and rest and not rest.endswith(b"\n"):
            rest = stream.readline(1 << 20)
        yield number, line


def read_file_as_one(file: SourceFile, options: ReadOptions, reading: Reading) -> Iterator[Record]:
    with open_stream(file.path) as opened:
        reading.position = opened.position
        data = bytearray()  # grows in place; one read would reserve the largest size there may be
        while len(data) <= options.max_text_record and (part := opened.stream.read(1 << 20)):
            data += part
        yield Record("", data, len(data))


def read_lines(file: SourceFile, options: ReadOptions, reading: Reading) -> Iterator[Record]:
    limit = options.max_json_record if file.format == "jsonl" else options.max_text_record
    with open_stream(file.path) as opened:
        reading.position = opened.position
        for number, line in _lines(opened.stream, limit):
            if not line.isspace():
                yield Record(f"line {number}", line, len(line))


def read_blocks(file: SourceFile, options: ReadOptions, reading: Reading) -> Iterator[Record]:
    with open_stream(file.path) as opened:
        reading.position = opened.position
        block: list[bytes] = []
        start, size = 1, 0
        for number, line in _lines(opened.stream, options.max_text_record):
            if not line.isspace():
                if not block:
                    start = number
                if size <= options.max_text_record:
                    block.append(line)
                size += len(line)
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
        for number, line in _lines(opened.stream, options.max_json_record):
            if inside is None:
                if line.startswith(b"<doc "):
                    inside, start, size = [], number, 0
                elif not line.isspace():
                    yield Record(f"line {number}", line, len(line))
            elif line.startswith(b"</doc>"):
                yield Record(f"line {start}", (b"".join(inside),), size)
                inside = None
            else:
                if size <= options.max_text_record:
                    inside.append(line)
                size += len(line)
        if inside is not None:
            yield Record(f"line {start}", None, size)


def parse_text(record: Record, options: ReadOptions) -> str:
    return text_of(record.payload, options)


def text_of(data: bytes | bytearray, options: ReadOptions) -> str:
    if len(data) > options.max_text_record:
        raise options.too_long()
    return decode(data)


def parse_wiki(record: Record, options: ReadOptions) -> str:
    if isinstance(record.payload, tuple):
        return text_of(record.payload[0], options)
    if record.payload is None:
        raise BadRecord("a <doc> without its </doc>")
    if not record.payload.startswith(b"{"):
        raise BadRecord("text outside <doc> ... </doc>, as WikiExtractor writes it")
    return parse_json(record, options)


def parse_json(record: Record, options: ReadOptions) -> str:
    if len(record.payload) > options.max_json_record:
        raise options.too_long()
    # Bytes are stripped first: a long line with its line break would be there twice as a string.
    text = decode(record.payload.rstrip()).rstrip()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRecord(f"not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno})") from None
    except RecursionError:
        raise BadRecord("not valid JSON (nested too deeply)") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise BadRecord(f"not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise BadRecord(f"a JSON {type(content).__name__} where an object with the text was expected")
    for field in options.text_fields:
        if field in content:
            value = content[field]
            if isinstance(value, str):
                return value
            raise BadRecord(f"the field {field!r} holds {_json_type(value)}, not a text")
    raise no_such_field(options.text_fields, list(content))


def _json_type(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")
