"""Tables as sources: parquet files, folders saved by `datasets`, and datasets streamed from the hub."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from data_prep.shard_format.errors import UserError
from data_prep.shard_format.hub import require_hub
from data_prep.sources.records import Reading, ReadOptions, Record, SourceFile, no_such_field
from data_prep.sources.streams import DamagedFile, open_stream, plain_name
from data_prep.sources.text_files import text_of
from data_prep.sources.texts import BadRecord

# Arrow's own pools keep what is freed: after one very long document, a gigabyte. Read at pyarrow's import.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

# pyarrow, datasets and huggingface_hub are imported in functions: --help and text files need none of them.
ROWS = 256
ROWS_OF_A_PAGE = 1024
"""So many rows do parquet writers put into a page before they look at its size for the first time."""


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
    import pyarrow.parquet as pq

    with pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False) as table:
        name = _text_column(file.path, table.schema_arrow, options)
        groups = range(*file.part) if file.part is not None else range(table.num_row_groups)
        first = sum(table.metadata.row_group(index).num_rows for index in range(groups.start))
        for group in groups:
            metadata = table.metadata.row_group(group)
            rows = _batch_rows(f"{file.path}, row group {group}", metadata, name, options)
            batches = table.iter_batches(rows, row_groups=[group], columns=[name], use_threads=False)
            yield from _rows(batches, name, first)
            first += metadata.num_rows


def _batch_rows(place: str, group: Any, name: str, options: ReadOptions) -> int:
    """How many rows to read at a time, so that their texts have about the size of one document at most.

    Raises:
        DamagedFile: the row group has no such column, which the file has.
        UserError: a page may be larger than four such documents. Arrow unpacks whole pages and holds up to four
            times as much; how large they are stands in their headers alone, so it is estimated.
    """
    columns = [group.column(index) for index in range(group.num_columns)]
    sizes = [column.total_uncompressed_size for column in columns if column.path_in_schema == name]
    if not sizes:
        raise DamagedFile(f"{place} is damaged: it lacks the column {name!r}; fetch or write it again")
    size = sizes[0]
    row = size / max(1, group.num_rows)
    page, limit = min(size, row * ROWS_OF_A_PAGE), 4 * options.max_document_bytes
    if page > limit:
        raise UserError(
            f"{place}: rows of {row / 1e6:,.1f} MB on average make pages of up to {page / 1e6:,.0f} MB, more than "
            f"{limit / 1e6:,.0f} MB; write the file again with fewer rows in a row group, or raise --max-document-mb"
        )
    return max(1, min(ROWS, int(options.max_document_bytes / max(1, row))))


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
    with _arrow_errors(file.path):
        yield from _rows(part.iter(batch_size=ROWS), column, first)
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
    require_hub(name)
    try:
        return datasets.load_dataset(parts[0], config, split=split, streaming=True)
    except Exception as error:
        raise UserError(f"{name}: the dataset cannot be streamed: {_line(error)}") from None


def read_hub(file: SourceFile, options: ReadOptions, reading: Reading) -> Iterator[Record]:
    assert file.part is not None
    index, num_parts = file.part
    dataset = _stream(file.path).shard(num_shards=num_parts, index=index).with_format("arrow")
    first = 0
    for table in _tables(file.path, dataset):
        column = _text_column(file.path, table.schema, options)
        yield from _rows([table], column, first)
        first += table.num_rows


def _tables(name: str, dataset: Any) -> Iterator[Any]:
    try:
        yield from dataset.iter(batch_size=ROWS)
    except Exception as error:  # of the network, the hub's client, a decoder
        raise UserError(f"{name}: the stream broke off: {_line(error)}") from None


def parse_cell(record: Record, options: ReadOptions) -> str:
    if record.payload is None:
        raise BadRecord("the text is null")
    if len(record.payload) > options.max_text_record:
        raise options.too_long()
    return text_of(bytes(record.payload), options)


def _text_column(path: str, schema: Any, options: ReadOptions) -> str:
    """Raises UserError, whatever is said about bad records: no row of this table could be read."""
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


@contextlib.contextmanager
def _arrow_errors(path: str) -> Iterator[None]:
    """Arrow's errors are ValueErrors or OSErrors that do not say which file they are about."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = f"{path} is damaged or no parquet file: {_line(error)}"
        raise DamagedFile(f"{reason}; fetch or write it again") from None


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
