"""One document's text: decoded, normalised, and in pieces where it is long.

Normalised means: CRLF is LF, no byte order mark, no ASCII white space at either end. Duplicates are documents
whose normalised texts are equal.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator

LONG = 1 << 20
"""From this many bytes on a text is handled in pieces, so that no document is ever a string as a whole: one
character outside Latin-1 would make Python hold it in two or four bytes per character."""
PIECE = 1 << 18
WHITE = " \t\r\n\f\v"
LEADING = WHITE + "\ufeff"
BOM = b"\xef\xbb\xbf"

# A tokenizer must give the same tokens for two pieces as for the whole, so a piece ends before a single space
# between two words: byte-level BPE ties that space to the next word, the others drop it.
_WORD_END = re.compile(rb"[A-Za-z0-9,.;](?= [A-Za-z0-9])")
_CHARACTER_START = re.compile(rb"(?s).(?=[\x00-\x7f\xc2-\xf4])")
# In the inside of a JSON string an escape (or a pair of surrogate escapes) must stay whole.
_JSON_START = re.compile(rb"[\x80-\xbf](?=[\xc2-\xf4])|[^\\](?=\\u(?![dD][c-fC-F])[0-9a-fA-F]{4})")
_JSON_UNIT = re.compile(
    rb"(?s)\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u....|\\[^u]|[\xc2-\xf4][\x80-\xbf]+|[^\\\x80-\xff]"
)
_LONGEST_UNIT = 12


class BadRecord(ValueError):
    """One record that is no document: its message says what is wrong, not where."""


class LongText:
    """A text too long for one string: UTF-8 bytes, or the inside of a JSON string literal."""

    def __init__(
        self, buffer: bytes | memoryview, start: int = 0, end: int | None = None, json: bool = False
    ):
        self._buffer = memoryview(buffer)
        self._start = start
        self._end = len(self._buffer) if end is None else end
        self._json = json

    def pieces(self) -> Iterator[str]:
        """The normalised text in strings of about PIECE bytes.

        Raises:
            BadRecord: at the first piece that is not valid UTF-8.
        """
        pending = ""
        waiting: list[str] = []
        begun = False
        for piece in self._raw_pieces():
            piece = (pending + piece).replace("\r\n", "\n")
            if not begun:
                piece = piece.lstrip(LEADING)
                begun = bool(piece)
            # White space at the end of a piece waits: it may be the end of the text.
            kept = piece.rstrip(WHITE)
            pending = piece[len(kept) :]
            if kept:
                yield from waiting
                waiting.clear()
                yield kept
            if len(pending) >= PIECE and not pending.endswith("\r"):
                waiting.append(pending)
                pending = ""

    def _raw_pieces(self) -> Iterator[str]:
        start = self._start
        while start < self._end:
            end = self._cut(start)
            data = bytes(self._buffer[start:end])
            try:
                text = data.decode()
                yield json.loads(f'"{text}"', strict=False) if self._json else text
            except UnicodeDecodeError as error:
                raise BadRecord(
                    f"invalid UTF-8 (byte 0x{data[error.start]:02x} at offset {start + error.start})"
                ) from None
            except json.JSONDecodeError as error:
                raise BadRecord(f"not valid JSON ({error.msg} near offset {start + error.pos})") from None
            start = end

    def _cut(self, start: int) -> int:
        size = PIECE
        while start + size < self._end:
            window_start = max(start, start + size - 4096)
            window = bytes(self._buffer[window_start : start + size])
            for pattern in (_WORD_END, _JSON_START if self._json else _CHARACTER_START):
                ends = [match.end() for match in pattern.finditer(window)]
                if ends:
                    return window_start + ends[-1]
            if self._json and (end := self._unit_end(start, size)):
                return end
            size *= 2  # no place at all: not valid, or all white space
        return self._end

    def _unit_end(self, start: int, size: int) -> int | None:
        """Where the last whole character or escape of a window ends: slow, but it finds what there is."""
        ends = (match.end() for match in _JSON_UNIT.finditer(bytes(self._buffer[start : start + size])))
        whole = [end for end in ends if end <= size - _LONGEST_UNIT]
        return start + whole[-1] if whole else None


Text = str | LongText


def decode(data: bytes) -> str:
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


def text_of(data: bytes | memoryview) -> Text:
    """The text that these bytes spell."""
    return LongText(data) if len(data) >= LONG else decode(bytes(data))


def pieces_of(text: Text) -> Iterator[str]:
    """The normalised text as strings that are joined without anything between."""
    if isinstance(text, LongText):
        yield from text.pieces()
    elif len(text) >= LONG:
        yield from LongText(utf8(text)).pieces()
    else:
        yield normalised(text)


def normalised(text: str) -> str:
    return (text.replace("\r\n", "\n") if "\r" in text else text).lstrip(LEADING).rstrip(WHITE)


def utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"half of a surrogate pair (U+{ord(text[error.start]):04X} at character {error.start})"
        ) from None


def new_digest() -> hashlib.blake2b:
    """The digest that tells documents apart: BLAKE2b, 128 bits, over the normalised text in UTF-8."""
    return hashlib.blake2b(digest_size=16)
