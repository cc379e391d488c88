"""Parquet columns whose pages are too large for Arrow, read page by page with one text in memory at a time.

Arrow holds a page three to four times over, and writers put a thousand rows into a page before they look at its
size: of books, that is half a gigabyte. Here a page is unpacked into a file, once, and its texts are read from
there. Format: github.com/apache/parquet-format, README.md, Encodings.md and src/main/thrift/parquet.thrift;
the headers are Thrift's compact protocol.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from data_prep.shard_format.errors import UserError

LARGEST_PAGE = 1_000_000_000
"""Bytes of a page in memory: packed, and unpacked too where its codec knows no streams."""
_STREAMED = ("GZIP", "ZSTD", "BROTLI")
_LONGEST_HEADER = 1 << 16  # statistics may hold the beginnings of two texts
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY = 0, 2, 8
_SPECIFIC = {_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}


@dataclass(frozen=True)
class Page:
    """Where a page's content lies in the file, and its header's fields by their Thrift numbers."""

    start: int
    packed: int
    unpacked: int
    kind: int
    fields: dict[int, Any] = field(default_factory=dict)


def pages(file: BinaryIO, column: Any) -> list[Page]:
    """The pages of a column chunk, from their headers alone.

    Args:
        column: its pyarrow ColumnChunkMetaData.
    Raises:
        UserError: these are no page headers.
    """
    at = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        at = min(at, column.dictionary_page_offset)
    end = at + column.total_compressed_size
    found = []
    while at < end:
        file.seek(at)
        data = _Bytes(file.read(min(_LONGEST_HEADER, end - at)))
        try:
            header = data.struct()
            specific = header.get(_SPECIFIC.get(header[1], 0), {})
            page = Page(at + data.at, header[3], header[2], header[1], specific)
        except (LookupError, TypeError, ValueError, RecursionError):
            raise UserError("a page's header is damaged") from None
        if page.packed < 0 or page.unpacked < 0 or page.start + page.packed > end:
            raise UserError("a page ends beyond its column")
        found.append(page)
        at = page.start + page.packed
    return found


class _Bytes:
    """Numbers out of bytes, front to back. Raises ValueError at their end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        self.at += size
        if self.at > len(self._data):
            raise UserError("a page ends too early")
        return self._data[self.at - size : self.at]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def zigzag(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def struct(self) -> dict[int, Any]:
        """A Thrift struct, as page headers have them: of numbers, bytes (passed over) and structs."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self.take(1)[0]:
            number = number + (head >> 4) if head >> 4 else self.zigzag()
            fields[number] = self._value(head & 15)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self.take(1)[0]
        if kind in (4, 5, 6):
            return self.zigzag()
        if kind == 8:
            return self.take(self.varint()) and None
        if kind == 12:
            return self.struct()
        raise KeyError(kind)


def texts_of(file: BinaryIO, column: Any, found: list[Page], nullable: bool) -> Iterator[bytes | None]:
    """The column's values, row by row; None where there is none.

    Raises:
        LookupError, ValueError: a page is damaged, too large or encoded in a way that only Arrow reads.
    """
    dictionary: _Values | None = None
    with contextlib.ExitStack() as kept:
        for page in found:
            if page.kind == _DICTIONARY:
                content = kept.enter_context(tempfile.TemporaryFile())
                _unpack(file, page, column.compression, content)
                dictionary = _Values(content, page.fields[1])
            elif page.kind in (_DATA, _DATA_V2):
                with tempfile.TemporaryFile() as content:
                    _unpack(file, page, column.compression, content)
                    yield from _page_texts(content, page, dictionary, nullable)


def _page_texts(
    content: Any, page: Page, dictionary: _Values | None, nullable: bool
) -> Iterator[bytes | None]:
    num_values = page.fields[1]
    content.seek(0)
    if page.kind == _DATA_V2:
        encoding = page.fields[4]
        levels = content.read(page.fields[6] + page.fields[5])[page.fields[6] :]
    else:
        encoding = page.fields[2]
        levels = content.read(int.from_bytes(content.read(4), "little")) if nullable else b""
    there = _hybrid(levels, 1, num_values).astype(bool) if nullable else np.ones(num_values, dtype=bool)
    num_there = int(there.sum())
    if encoding == _PLAIN:
        values = iter(_Values(content, num_there, content.tell()))
    elif encoding in (_PLAIN_DICTIONARY, _RLE_DICTIONARY) and dictionary is not None:
        width = content.read(1)[0]
        values = map(dictionary.at, _hybrid(content.read(), width, num_there).tolist())
    else:
        raise UserError(f"a large page in encoding {encoding}: write the file again with smaller pages")
    for is_there in there.tolist():
        yield next(values) if is_there else None


class _Values:
    """Texts in a file, each behind its length in four bytes."""

    def __init__(self, file: BinaryIO, count: int, start: int = 0) -> None:
        self._file = file
        self._places: list[tuple[int, int]] = []
        at = start
        for _ in range(count):
            file.seek(at)
            head = file.read(4)
            size = int.from_bytes(head, "little")
            if len(head) < 4:
                raise UserError("a page ends too early")
            self._places.append((at + 4, size))
            at += 4 + size
        if at > file.seek(0, 2):
            raise UserError("a page ends too early")

    def __iter__(self) -> Iterator[bytes]:
        return map(self.at, range(len(self._places)))

    def at(self, index: int) -> bytes:
        start, size = self._places[index]
        self._file.seek(start)
        return self._file.read(size)


def _unpack(file: BinaryIO, page: Page, codec: str, target: Any) -> None:
    """The page's content, with its levels, into `target`."""
    file.seek(page.start)
    plain = page.packed if codec == "UNCOMPRESSED" else 0
    if page.kind == _DATA_V2:
        levels = page.fields[5] + page.fields[6]
        plain = levels if page.fields.get(7, True) else page.packed
    left = plain
    while left:
        data = file.read(min(left, 1 << 20))
        if not data:
            raise UserError("a page ends too early")
        target.write(data)
        left -= len(data)
    if page.packed > plain:
        _decompress(file.read(page.packed - plain), page.unpacked - plain, codec, target)
    target.flush()


def _decompress(data: bytes, size: int, codec: str, target: Any) -> None:
    import pyarrow as pa

    streamed = codec in _STREAMED
    if len(data) + (0 if streamed else size) > LARGEST_PAGE:
        raise UserError(
            f"a page of {size:,} bytes; write the file again with fewer rows in a row group, or with zstd"
        )
    if not streamed:
        # LZ4 is the name of two codecs; nothing has written the other one for years.
        name = "lz4_raw" if codec == "LZ4" else codec.lower()
        target.write(pa.Codec(name).decompress(data, size))
        return
    with pa.input_stream(pa.py_buffer(data), compression=codec.lower()) as stream:
        while part := stream.read(1 << 20):
            target.write(part)


def _hybrid(data: bytes, width: int, count: int) -> np.ndarray:
    """`count` numbers of `width` bits in Parquet's mixture of runs and packed bits, as int64."""
    parts: list[np.ndarray] = []
    source = _Bytes(data)
    left = count
    while left > 0:
        head = source.varint()
        if head & 1:
            packed = np.frombuffer(source.take((head >> 1) * width), dtype=np.uint8)
            bits = np.unpackbits(packed, bitorder="little").reshape((head >> 1) * 8, width)
            part = (bits @ (1 << np.arange(width, dtype=np.int64)))[:left]
        else:
            value = int.from_bytes(source.take((width + 7) // 8), "little")
            part = np.full(min(head >> 1, left), value, dtype=np.int64)
        if not len(part):
            raise UserError("a page's levels or indices are damaged")
        parts.append(part)
        left -= len(part)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
