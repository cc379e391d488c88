"""Tables as sources: parquet files, folders saved by `datasets`, and datasets streamed from the hub.

Texts leave here as UTF-8 buffers of Arrow memory, never as one Python string.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from data_prep.shard_format.errors import UserError
from data_prep.sources.parquet_pages import Page, pages, texts_of
from data_prep.sources.records import Reading, ReadOptions, Record, SourceFile, no_such_field
from data_prep.sources.streams import DamagedFile, open_stream, plain_name

# Arrow's own pools keep what is freed: after one very long document, a gigabyte. Read at pyarrow's import.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

ROWS = 256
LARGE_PAGE = 1 << 26
"""Bytes; Arrow holds up to four times as much of a page. In larger ones it is not trusted with memory."""


def parquet_parts(path: str) -> list[SourceFile]:
    """A parquet file, row group by row group; a packed one as a whole."""
    import pyarrow.parquet as pq

    if plain_name(path) != path:
        return [SourceFile(path, "parquet", os.path.getsize(path))]
    with _arrow_errors(path):
        groups = pq.ParquetFile(path).metadata
        sizes = [groups.row_group(index).total_byte_size for index in range(groups.num_row_groups)]
    return [SourceFile(path, "parquet", size, (index, index + 1)) for index, size in enumerate(sizes)]


def read_parquet(file: SourceFile, options: ReadOptions, reading: Reading) -> Iterator[Record]:
    reading.position = lambda: 0
    with _arrow_errors(file.path), contextlib.ExitStack() as held:
        if file.part is not None:
            source: Any = held.enter_context(open(file.path, "rb"))
        else:
            source = held.enter_context(tempfile.TemporaryFile())
            with open_stream(file.path) as opened:
                while data := opened.stream.read(1 << 20):
                    source.write(data)
        yield from _parquet_rows(file, source, options)
    reading.position = lambda: file.bytes


def _parquet_rows(file: SourceFile, source: Any, options: ReadOptions) -> Iterator[Record]:
    """The rows of the file's part: through Arrow, or page by page where its pages are large."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False) as table:
        name = _text_column(file.path, table.schema_arrow, options)
        column = table.schema.names.index(name) if name in table.schema.names else None
        groups = range(*file.part) if file.part is not None else range(table.num_row_groups)
        first = sum(table.metadata.row_group(index).num_rows for index in range(groups.start))
        for group in groups:
            rows, large = ROWS, None
            if column is not None:
                chunk = table.metadata.row_group(group).column(column)
                rows, large = _plan_of_pages(file.path, source, chunk)
            if large:
                nullable = table.schema.column(column).max_definition_level > 0
                yield from _large_rows(file.path, texts_of(source, chunk, large, nullable), first)
            else:
                batches = table.iter_batches(rows, row_groups=[group], columns=[name], use_threads=False)
                yield from _rows(batches, name, first)
            first += table.metadata.row_group(group).num_rows


def _plan_of_pages(path: str, source: Any, chunk: Any) -> tuple[int, list[Page] | None]:
    """How many rows Arrow may read at a time; the pages, where it had better not read them at all."""
    if chunk.total_uncompressed_size <= LARGE_PAGE:
        return ROWS, None
    try:
        found = pages(source, chunk)
    except ValueError as error:
        raise DamagedFile(f"{path} is damaged or no parquet file: {error}") from None
    largest = max((page.unpacked for page in found), default=1)
    return min(ROWS, max(1, LARGE_PAGE // max(1, largest))), found if largest > LARGE_PAGE else None


def _large_rows(path: str, texts: Iterator[bytes | None], first: int) -> Iterator[Record]:
    try:
        for number, text in enumerate(texts, first + 1):
            yield Record(f"row {number}", text, len(text or b""))
    except (LookupError, ValueError) as error:
        reason = "a page's header or indices are damaged" if isinstance(error, LookupError) else error
        raise DamagedFile(f"{path} is damaged, or cannot be read in bounded memory: {reason}") from None


def is_dataset_folder(path: str) -> bool:
    return any(os.path.exists(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def dataset_parts(path: str) -> list[SourceFile]:
    """A folder saved by `datasets`, in ranges of rows of about 4 MB."""
    if os.path.exists(os.path.join(path, "dataset_dict.json")):
        splits = sorted(name for name in os.listdir(path) if os.path.isdir(os.path.join(path, name)))
        raise UserError(
            f"{path} holds several splits ({', '.join(splits)}); name one: {os.path.join(path, splits[0])}"
        )
    dataset = _load_folder(path)
    size = sum(os.path.getsize(entry["filename"]) for entry in dataset.cache_files)
    num_parts = max(1, min(size >> 22, dataset.num_rows))
    bounds = [dataset.num_rows * part // num_parts for part in range(num_parts + 1)]
    return [
        SourceFile(path, "dataset", size // num_parts, (bounds[part], bounds[part + 1]))
        for part in range(num_parts)
    ]


def _load_folder(path: str) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(path)
    except Exception as error:
        raise DamagedFile(f"{path} does not load as a folder saved by `datasets`: {_line(error)}") from None


def read_dataset(file: SourceFile, options: ReadOptions, reading: Reading) -> Iterator[Record]:
    assert file.part is not None
    dataset = _load_folder(file.path)
    column = _text_column(file.path, dataset.features.arrow_schema, options)
    reading.position = lambda: 0
    first, last = file.part
    part = dataset.select(range(first, last)).select_columns([column]).with_format("arrow")
    yield from _rows((table for table in part.iter(batch_size=ROWS)), column, first)
    reading.position = lambda: file.bytes


def hub_parts(name: str) -> list[SourceFile]:
    """The files behind hub:NAME[:CONFIG[:SPLIT]], one part each; their sizes are not known."""
    dataset = _stream(name)
    return [SourceFile(name, "hub", 0, (index, dataset.num_shards)) for index in range(dataset.num_shards)]


def quiet_hub() -> None:
    """Without a network the hub's client warns a dozen times before it gives up; its last word is enough."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()


def _stream(name: str) -> Any:
    import datasets

    parts = name.split(":")[1:]
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise UserError(f"{name!r}: write hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT")
    config = parts[1] if len(parts) > 1 else None
    split = parts[2] if len(parts) > 2 else "train"
    quiet_hub()
    try:
        return datasets.load_dataset(parts[0], config, split=split, streaming=True)
    except Exception as error:
        raise UserError(f"{name}: the dataset cannot be streamed: {_line(error)}") from None


def read_hub(file: SourceFile, options: ReadOptions, reading: Reading) -> Iterator[Record]:
    assert file.part is not None
    index, num_parts = file.part
    dataset = _stream(file.path).shard(num_shards=num_parts, index=index).with_format("arrow")
    first = 0
    for table in dataset.iter(batch_size=ROWS):
        column = _text_column(file.path, table.schema, options)
        yield from _rows([table], column, first)
        first += table.num_rows


FORMATS = {"parquet": read_parquet, "dataset": read_dataset, "hub": read_hub}


def _text_column(path: str, schema: Any, options: ReadOptions) -> str:
    """Raises ValueError, whatever is said about bad records: no row of this table could be read."""
    import pyarrow as pa

    for name in options.text_fields:
        if name in schema.names:
            kind = schema.field(name).type
            if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                return name
            raise UserError(f"{path}: the field {name!r} holds {kind}, not a text")
    raise UserError(f"{path}: {no_such_field(options.text_fields, schema.names)}")


def _rows(batches: Any, column: str, first: int) -> Iterator[Record]:
    number = first
    for batch in batches:
        values = batch.column(column)
        for chunk in getattr(values, "chunks", [values]):
            for value in chunk:
                number += 1
                buffer = value.as_buffer()
                data = None if buffer is None else memoryview(buffer)
                yield Record(f"row {number}", data, 0 if data is None else len(data))


class _arrow_errors:
    """Arrow's errors are ValueErrors or OSErrors that do not say which file they are about."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import pyarrow as pa

        if isinstance(error, (pa.ArrowInvalid, pa.ArrowNotImplementedError)) or (
            isinstance(error, OSError) and error.errno is None
        ):
            raise DamagedFile(f"{self._path} is damaged or no parquet file: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
