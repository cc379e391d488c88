"""Every format is a pair of functions in FORMATS: files to records, records to texts.

`read` splits a file into raw records and does as little else as it can, since several processes may read the
same file and take turns in working on its parts; `parse` makes one record's text and may find it bad.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from data_prep.sources.csv_files import parse_csv, read_csv
from data_prep.sources.installed_docs import read_docstrings
from data_prep.sources.pages import parse_html, parse_markdown
from data_prep.sources.records import Reading, ReadOptions, Record, SourceFile
from data_prep.sources.tables import parse_cell, read_dataset, read_hub, read_parquet
from data_prep.sources.text_files import (
    parse_json,
    parse_text,
    parse_wiki,
    read_blocks,
    read_file_as_one,
    read_lines,
    read_wiki,
)
from data_prep.sources.texts import normalised, utf8


def _parse_ready(record: Record, options: ReadOptions) -> str:
    text: str = record.payload
    return text


class Format(NamedTuple):
    read: Callable[[SourceFile, ReadOptions, Reading], Iterator[Record]]
    parse: Callable[[Record, ReadOptions], str]


FORMATS = {
    "file": Format(read_file_as_one, parse_text),
    "line": Format(read_lines, parse_text),
    "block": Format(read_blocks, parse_text),
    "jsonl": Format(read_lines, parse_json),
    "wiki": Format(read_wiki, parse_wiki),
    "csv": Format(read_csv, parse_csv),
    "markdown": Format(read_file_as_one, parse_markdown),
    "html": Format(read_file_as_one, parse_html),
    "parquet": Format(read_parquet, parse_cell),
    "dataset": Format(read_dataset, parse_cell),
    "hub": Format(read_hub, parse_cell),
    "installed-docs": Format(read_docstrings, _parse_ready),
}
SPLITTABLE = ("line", "block", "jsonl", "wiki")
"""Formats whose records are found much faster than worked on: processes may share one file."""


def document_of(record: Record, kind: str, options: ReadOptions) -> str:
    """The normalised text of a record of a file of format `kind`.

    Raises:
        BadRecord: there is none, it cannot be encoded, or it is too long.
    """
    text = normalised(FORMATS[kind].parse(record, options))
    if len(utf8(text)) > options.max_document_bytes:
        raise options.too_long()
    return text
