"""Texts: normalised, decoded, and in pieces that are the text as a whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sources import texts
from data_prep.sources.texts import BadRecord, decode, normalised, pieces_of, utf8

ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=400)
WORDS = st.lists(
    st.sampled_from(["a", "word", "\r\n", "  ", "é", "漢字", '"', "\\", "\n", "\U0001f600", "1."]),
    max_size=200,
).map(" ".join)


def test_normalised() -> None:
    assert normalised("\ufeff \r\n one\r\ntwo \n") == "one\ntwo"
    assert normalised("a\u00a0") == "a\u00a0", "only ASCII white space is taken off"


@settings(deadline=None, max_examples=200)
@given(text=ANY_TEXT | WORDS)
def test_pieces_join_to_the_text(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "PIECE", 16)
        pieces = list(pieces_of(utf8(text)))
    assert "".join(pieces) == text
    assert all(0 < len(utf8(piece)) <= 16 for piece in pieces)


def test_a_piece_ends_before_a_space_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte-level BPE ties a space to the word after it: a cut elsewhere would change the tokens."""
    monkeypatch.setattr(texts, "PIECE", 16)
    pieces = list(pieces_of(b"one two three four five six seven"))
    assert len(pieces) > 1
    assert all(piece.startswith(" ") and not piece.endswith(" ") for piece in pieces[1:])


def test_bad_bytes_are_named() -> None:
    with pytest.raises(BadRecord, match=r"invalid UTF-8 \(byte 0xff at offset 30\)"):
        decode(b"x" * 30 + b"\xff")
    with pytest.raises(BadRecord, match=r"half of a surrogate pair \(U\+D800 at character 1\)"):
        utf8("a\ud800")
