"""CSV files with a row of names: a document for each row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from data_prep.shard_format.errors import UserError
from data_prep.sources.records import Reading, ReadOptions, Record, SourceFile, no_such_field
from data_prep.sources.streams import DamagedFile, open_stream
from data_prep.sources.text_files import text_of
from data_prep.sources.texts import BadRecord


def read_csv(file: SourceFile, options: ReadOptions, reading: Reading) -> Iterator[Record]:
    """The cells of the text's column; None of a row that is shorter.

    Raises:
        UserError: no such column.
        DamagedFile: quotes that do not fit, after which nobody knows where a row ends, or a cell without end.
    """
    with open_stream(file.path) as opened:
        reading.position = opened.position
        # Bytes that are no UTF-8 pass through, so that one bad row is one bad record.
        lines = io.TextIOWrapper(opened.stream, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(lines, strict=True)
        begun, before = 1, csv.field_size_limit()
        try:
            csv.field_size_limit(options.max_text_record)
            names = next(reader, [])
            field = next((name for name in options.text_fields if name in names), None)
            if field is None:
                raise UserError(f"{file.path}: {no_such_field(options.text_fields, names)}")
            column, begun = names.index(field), reader.line_num + 1
            for row in reader:
                if row:
                    cell = row[column].encode("utf-8", "surrogateescape") if column < len(row) else None
                    yield Record(f"line {begun}", cell, len(cell or b""))
                begun = reader.line_num + 1
        except csv.Error as error:
            raise DamagedFile(
                f"{file.path}, line {begun}: no CSV ({error}); quote cells with line breaks, commas or quotes and "
                "double the quotes inside, or write the file again"
            ) from None
        finally:
            csv.field_size_limit(before)
            lines.detach()


def parse_csv(record: Record, options: ReadOptions) -> str:
    if record.payload is None:
        raise BadRecord("the row has too few cells")
    return text_of(record.payload, options)
