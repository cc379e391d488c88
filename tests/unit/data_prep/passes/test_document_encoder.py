"""Documents to tokens: as the tokenizer does, in pieces too; special tokens' names are ordinary text."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from transformers import AutoTokenizer

from data_prep.passes import document_encoder
from data_prep.passes.document_encoder import Encoder
from data_prep.shard_format.tokenizer_info import tokenizer_info
from data_prep.sources import texts
from data_prep.sources.texts import normalised
from tests.unit.data_prep.writing import documents_in, make


def test_special_tokens_in_a_text_are_ordinary(tmp_path: Path, tokenizer_folder: str) -> None:
    text = "a model [SEP] the [MASK] reads [CLS] [PAD] [UNK] fast student é"  # é: not the short cut
    (tmp_path / "a.txt").write_text(text)
    assert make(tmp_path / "a.txt", "--tokenizer", tokenizer_folder, "--out", tmp_path / "o") == 0
    (document,) = documents_in(tmp_path / "o")
    backend = AutoTokenizer.from_pretrained(tokenizer_folder).backend_tokenizer
    backend.encode_special_tokens = True
    assert list(document) == backend.encode(text, add_special_tokens=False).ids
    assert not set(document) & {0, 2, 3, 4}


def encoder_with_whole_words(tokenizer_folder: str) -> tuple[Encoder, Any]:
    """A tokenizer whose pre-tokeniser leaves "[SEP]" whole: as a word it is in the vocabulary."""
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    info = tokenizer_info(tokenizer)
    return Encoder(tokenizer.backend_tokenizer.to_str(), info), info


@pytest.mark.parametrize("long", [False, True])
def test_special_tokens_that_are_words_are_spelled_apart(
    tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    if long:
        monkeypatch.setattr(document_encoder, "LONG", 30)
        monkeypatch.setattr(texts, "PIECE", 16)
    encoder, info = encoder_with_whole_words(tokenizer_folder)
    inputs = [
        "the model reads a student",
        "the [SEP] model [MASK] reads the large [PAD] shard",
        "a fast batch",
    ]
    found = list(encoder.encode(inputs))
    for document in found:
        assert document.tokens[-1] == info.sep_id
        assert not set(document.tokens[:-1].tolist()) & {0, 2, 3, 4}
    plain = [[5, 7, 12, 6, 10], [6, 15, 18]]
    assert len(found[0].tokens) == len(plain[0]) + 1
    assert len(found[2].tokens) == len(plain[1]) + 1


def test_long_documents_give_the_same_tokens_in_pieces(
    tokenizer_folder: str, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    encoder = Encoder(tokenizer.backend_tokenizer.to_str(), tokenizer_info(tokenizer))
    whole = list(encoder.encode(documents[:40]))
    monkeypatch.setattr(document_encoder, "LONG", 50)
    monkeypatch.setattr(texts, "PIECE", 16)
    cut = list(encoder.encode(documents[:40]))
    for first, second in zip(whole, cut, strict=True):
        assert first.digest == second.digest
        np.testing.assert_array_equal(first.tokens, second.tokens)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.lists(
        st.text(max_size=12)
        | st.sampled_from(["Model", "\n", "\x0b", "\x7f", "\r\n", "É", "e\u0301", "漢", "[SEP]", " "])
    ).map("".join),
    lowercase=st.booleans(),
)
def test_ascii_lines_are_tokenised_as_the_tokenizer_does(
    tokenizer_folder: str, text: str, lowercase: bool
) -> None:
    """Against the tokenizer as it is: the short cut around its normaliser must not be seen."""
    encoder, backend = encoder_and_backend(tokenizer_folder, lowercase)
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    (found,) = encoder.encode([normalised(text)])
    assert found.tokens[:-1].tolist() == backend.encode(normalised(text), add_special_tokens=False).ids


@functools.cache
def encoder_and_backend(tokenizer_folder: str, lowercase: bool) -> tuple[Encoder, Tokenizer]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.backend_tokenizer.normalizer = BertNormalizer(lowercase=lowercase)
    encoder = Encoder(tokenizer.backend_tokenizer.to_str(), tokenizer_info(tokenizer))
    tokenizer.backend_tokenizer.encode_special_tokens = True
    return encoder, tokenizer.backend_tokenizer
