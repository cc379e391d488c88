"""Files as streams of bytes, whatever they are compressed with, and how far into the file one has read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, BinaryIO, NamedTuple

import zstandard

from data_prep.shard_format.errors import UserError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


class DamagedFile(UserError):
    """A packed file that cannot be unpacked to its end. No single record of it is to blame."""


def plain_name(path: str) -> str:
    """`path` without the ending of its compression."""
    plain, ending = os.path.splitext(path)
    return plain if ending.lower() in COMPRESSIONS else path


class ByteStream(NamedTuple):
    """An open file, unpacked."""

    stream: IO[bytes]
    position: Callable[[], int]
    """Bytes read of the file as it is stored."""


@contextmanager
def open_stream(path: str) -> Iterator[ByteStream]:
    """Open a plain, .gz, .bz2, .xz or .zst file for reading.

    Raises:
        DamagedFile: the packed data is damaged or ends too early, here or while the caller reads.
    """
    with open(path, "rb") as raw:
        # gzip and zstd take it for no text.
        if plain_name(path) != path and not os.fstat(raw.fileno()).st_size:
            raise DamagedFile(f"{path} is empty, and no packed file is; fetch or pack it again")
        try:
            yield ByteStream(_unpack(path, raw), raw.tell)
        except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
            raise DamagedFile(f"{path} is damaged or cut short: {error}; fetch or pack it again") from None
        except OSError as error:
            # bz2 has no error class of its own.
            if path.lower().endswith(".bz2") and "data stream" in str(error):
                raise DamagedFile(f"{path} is damaged: {error}; fetch or pack it again") from None
            raise


def _unpack(path: str, raw: BinaryIO) -> Any:
    ending = os.path.splitext(path)[1].lower()
    if ending == ".gz":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    if ending == ".bz2":
        return bz2.BZ2File(raw)
    if ending == ".xz":
        return lzma.LZMAFile(raw)
    if ending == ".zst":
        return io.BufferedReader(_ZstdFile(raw), buffer_size=1 << 20)
    return raw


class _ZstdFile(io.RawIOBase):
    """zstandard's own stream_reader takes a file that is cut short for a whole one; this does not."""

    def __init__(self, raw: BinaryIO) -> None:
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._raw = raw
        self._frame = self._new_frame()
        self._fed = False
        self._packed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target) -> int:  # type: ignore[no-untyped-def,override]
        while not self._plain:
            packed = self._packed or self._raw.read(1 << 16)
            self._packed = b""
            if not packed:
                if self._fed:
                    raise EOFError("the last zstd frame has no end")
                return 0
            if self._frame.eof:
                self._frame = self._new_frame()
            self._fed = True
            try:
                self._plain = memoryview(self._frame.decompress(packed))
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            if self._frame.eof:
                self._fed = False
                self._packed = self._frame.unused_data
        size = min(len(target), len(self._plain))
        target[:size] = self._plain[:size]
        self._plain = self._plain[size:]
        return size
