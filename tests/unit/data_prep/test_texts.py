"""Texts in pieces are the texts as a whole; a long JSON line is read as json.loads reads it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sources import texts
from data_prep.sources.long_json import long_json_text
from data_prep.sources.texts import BadRecord, LongText, decode, normalised, pieces_of, utf8

ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=400)
WORDS = st.lists(
    st.sampled_from(["a", "word", "\r\n", "  ", "é", "漢字", '"', "\\", "\n", "\U0001f600", "1."]),
    max_size=200,
).map(" ".join)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PIECE", 16)


def test_normalised() -> None:
    assert normalised("\ufeff \r\n one\r\ntwo \n") == "one\ntwo"
    assert normalised("a\u00a0") == "a\u00a0", "only ASCII white space is taken off"


@settings(deadline=None, max_examples=200)
@given(text=ANY_TEXT | WORDS)
def test_pieces_of_a_long_text_join_to_the_text(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE", 16)
        assert "".join(LongText(text.encode()).pieces()) == normalised(text)


@settings(deadline=None, max_examples=200)
@given(text=ANY_TEXT | WORDS, ascii_only=st.booleans())
def test_pieces_of_a_json_string_join_to_the_text(text: str, ascii_only: bool) -> None:
    line = json.dumps({"id": [1, {"text": "no"}], "text": text}, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE", 16)
        assert "".join(long_json_text(line, ("text",)).pieces()) == normalised(text)


def test_a_piece_ends_before_a_space_between_words(small_pieces: None) -> None:
    """Byte-level BPE ties a space to the word after it: a cut elsewhere would change the tokens."""
    pieces = list(LongText(b"one two three four five six seven").pieces())
    assert len(pieces) > 1
    assert all(piece.startswith(" ") and not piece.endswith(" ") for piece in pieces[1:])


def test_bad_bytes_are_named(small_pieces: None) -> None:
    message = r"invalid UTF-8 \(byte 0xff at offset 30\)"
    with pytest.raises(BadRecord, match=message):
        decode(b"x" * 30 + b"\xff")
    with pytest.raises(BadRecord, match=message):
        list(LongText(b"x" * 30 + b"\xff" + b" y" * 40).pieces())
    with pytest.raises(BadRecord, match=r"half of a surrogate pair \(U\+D800 at character 1\)"):
        utf8("a\ud800")


def test_long_strings_are_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LONG", 64)
    monkeypatch.setattr(texts, "PIECE", 32)
    text = "some words and numbers 1 2 3 " * 20
    pieces = list(pieces_of(text))
    assert len(pieces) > 5
    assert "".join(pieces) == text.strip()


VALUES: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None, max_examples=200)
@given(content=st.dictionaries(st.text(max_size=6), VALUES, max_size=5), indent=st.none() | st.just(1))
def test_any_object_is_scanned_like_json(content: dict, indent: int | None) -> None:
    content = {**content, "the text": "found"}
    line = json.dumps(content, indent=indent).encode() + b"\n"
    assert "".join(long_json_text(line, ("absent", "the text")).pieces()) == "found"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "abc', "string that starts at offset 9 has no end"),
        (b'["text"]', r"expected '\{' at offset 0"),
        (b'{"text": [1, {"a": "b"', "not closed"),
        (b'{"text" "abc"}', "expected ':'"),
        (b'{"text": "abc"} x', "extra data at offset 15"),
        (b'{"text": "abc" "b": 1}', "expected ','"),
        (b'{"text": nonsense}', "expected a value at offset 9"),
        (b'{"text": 12}', "the field 'text' does not hold a text"),
        (
            b'{"body": "abc", "id": 3}',
            r"no text field 'text'; the fields are 'body', 'id' \(choose with --text-field",
        ),
        (b"{}", "the fields are none"),
        (b'{"te\xffxt": 1}', "a field's name at offset 1"),
    ],
)
def test_broken_long_json(line: bytes, message: str) -> None:
    with pytest.raises(BadRecord, match=message):
        long_json_text(line, ("text",))


def test_broken_escape_in_long_json() -> None:
    with pytest.raises(BadRecord, match="not valid JSON"):
        list(long_json_text(rb'{"text": "abc \x41"}', ("text",)).pieces())
