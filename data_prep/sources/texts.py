"""One document's text: decoded, normalised, and in pieces where it is long.

Normalised means: CRLF is LF, no byte order mark, no ASCII white space at either end. Duplicates are documents
whose normalised texts are equal.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from data_prep.shard_format.errors import UserError

PIECE = 1 << 18
WHITE = " \t\r\n\f\v"
LEADING = WHITE + "\ufeff"
BOM = b"\xef\xbb\xbf"

# A tokenizer must give the same tokens for two pieces as for the whole, so a piece ends before a single space
# between two words: byte-level BPE ties that space to the next word, the others drop it.
_WORD_END = re.compile(rb"[A-Za-z0-9,.;](?= [A-Za-z0-9])")
_CHARACTER_START = re.compile(rb"(?s).(?=[\x00-\x7f\xc2-\xf4])")


class BadRecord(UserError):
    """One record that is no document: its message says what is wrong, not where."""


def decode(data: bytes | bytearray) -> str:
    """UTF-8 to str, without a byte order mark.

    Raises:
        BadRecord: naming the first bad byte.
    """
    try:
        return (data[3:] if data.startswith(BOM) else data).decode()
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"invalid UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start})"
        ) from None


def normalised(text: str) -> str:
    return (text.replace("\r\n", "\n") if "\r" in text else text).lstrip(LEADING).rstrip(WHITE)


def utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"half of a surrogate pair (U+{ord(text[error.start]):04X} at character {error.start})"
        ) from None


def digest(data: bytes) -> bytes:
    """What distinguishes documents: BLAKE2b, 128 bits, over the normalised text in UTF-8."""
    return hashlib.blake2b(data, digest_size=16).digest()


def pieces_of(data: bytes) -> Iterator[str]:
    """A text, given in UTF-8, in strings of at most PIECE bytes that are joined without anything between."""
    start = 0
    while start < len(data):
        end = _piece_end(data, start)
        yield data[start:end].decode()
        start = end


def _piece_end(data: bytes, start: int) -> int:
    if start + PIECE >= len(data):
        return len(data)
    window_start = max(start, start + PIECE - 4096)
    window = data[window_start : start + PIECE]
    for pattern in (_WORD_END, _CHARACTER_START):
        if ends := [match.end() for match in pattern.finditer(window)]:
            return window_start + ends[-1]
    raise AssertionError("no character in 4096 bytes of UTF-8")
