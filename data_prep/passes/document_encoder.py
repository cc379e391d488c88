"""Texts to token ids with a Hugging Face fast tokenizer's backend."""

from __future__ import annotations

import array
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data_prep.shard_format.manifest import token_dtype
from data_prep.shard_format.tokenizer_info import TokenizerInfo
from data_prep.sources.texts import digest, pieces_of, utf8

BATCH_CHARACTERS = 1 << 20
BATCH_TEXTS = 1024
LONG = 1 << 20
"""From this many bytes on a text is tokenised in pieces: the tokenizer holds a hundred bytes for each token."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Encoded:
    """A document: its digest (16 bytes) and its tokens, the separator last."""

    digest: bytes
    tokens: np.ndarray


def _ascii_is_easy(content: dict[str, Any]) -> bool:
    """Whether all that the tokenizer's normaliser does to ASCII text is to lower-case it.

    BERT's spends 40 % of the tokenizer's time on taking off accents and parting Chinese characters, which
    ASCII has none of (control characters, which it removes, are left to it). Its pre-tokeniser parts at line
    breaks, so that lines can be distinguished. Added words would have to be normalised too: not with these.
    """
    normalizer, pre_tokenizer = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    return (
        normalizer.get("type") == "BertNormalizer"
        and normalizer["clean_text"]
        and pre_tokenizer.get("type") == "BertPreTokenizer"
        and all(token["special"] for token in content.get("added_tokens", []))
    )


def _ready(tokenizer: Any) -> Any:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # "[SEP]" in a text is three ordinary tokens, not the end of a document.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _encode_batch(tokenizer: Any, texts: list[str]) -> list[Any]:
    return tokenizer.encode_batch_fast(texts, add_special_tokens=False) if texts else []


class Encoder:
    """Tokenises documents in batches; made from text, so that it can be sent to other processes."""

    def __init__(self, backend: str, info: TokenizerInfo) -> None:
        content = json.loads(backend)
        self._tokenizer: Any = _ready(Tokenizer.from_str(backend))
        self._lowercase = False
        self._unnormalized: Any = None
        if _ascii_is_easy(content):
            self._lowercase = content["normalizer"]["lowercase"]
            self._unnormalized = _ready(Tokenizer.from_str(json.dumps({**content, "normalizer": None})))
        self._dtype = token_dtype(info.vocab_size)
        self._separator = info.sep_id
        forbidden = set(info.special_ids) - {info.unk_id}
        self._is_forbidden = np.zeros(info.vocab_size, dtype=bool)
        self._is_forbidden[list(forbidden)] = True
        added = content.get("added_tokens", [])
        self._literals = [token["content"] for token in added if token["id"] in forbidden]

    def encode(self, texts: Iterable[str]) -> Iterator[Encoded]:
        """Encode normalised texts, in order."""
        digests: list[bytes] = []
        batch: list[str] = []
        characters = 0
        for text in texts:
            data = utf8(text)
            if len(data) >= LONG:
                yield from map(Encoded, digests, self._tokens(batch))
                digests, batch, characters = [], [], 0
                del text
                yield Encoded(digest(data), self._long(data))
                del data
                continue
            digests.append(digest(data))
            batch.append(text)
            characters += len(text)
            if characters > BATCH_CHARACTERS or len(batch) > BATCH_TEXTS:
                yield from map(Encoded, digests, self._tokens(batch))
                digests, batch, characters = [], [], 0
        yield from map(Encoded, digests, self._tokens(batch))

    def _long(self, data: bytes) -> np.ndarray:
        pieces = [tokens[:-1] for piece in pieces_of(data) for tokens in self._tokens([piece])]
        return np.concatenate([*pieces, np.array([self._separator], self._dtype)])

    def _tokens(self, texts: list[str]) -> Iterator[np.ndarray]:
        """The tokens of each text, with the separator and without any other special token."""
        ids, lengths = self._encode(texts)
        ends = np.cumsum(lengths, dtype=np.int64)
        literals = np.count_nonzero(self._is_forbidden[ids]) > len(texts)  # each document has its separator
        start = 0
        for text, end in zip(texts, ends.tolist(), strict=True):
            tokens = ids[start:end]
            if literals and self._is_forbidden[tokens[:-1]].any():
                tokens = self._without_special(text)
            yield tokens
            start = end

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, list[int]]:
        """The tokens of all texts, each followed by the separator; how many each has."""
        plain: list[str] = []
        easy: list[str] = []
        takes: list[list[bool]] = []
        for text in texts:
            takes.append([])
            for is_easy, run in self._runs(text):
                (easy if is_easy else plain).append(run)
                takes[-1].append(is_easy)
        encodings = (
            iter(_encode_batch(self._tokenizer, plain)),
            iter(_encode_batch(self._unnormalized, easy)),
        )
        ids = array.array("H" if self._dtype.itemsize == 2 else "I")
        lengths = []
        for take in takes:
            before = len(ids)
            for is_easy in take:
                ids.fromlist(next(encodings[is_easy]).ids)
            ids.append(self._separator)
            lengths.append(len(ids) - before)
        return np.frombuffer(ids, dtype=self._dtype), lengths

    def _runs(self, text: str) -> Iterator[tuple[bool, str]]:
        """Cut a text into runs of lines that are easy (ASCII, normalised here) and runs that are not."""
        if self._unnormalized is None:
            yield False, text
            return
        lines = [text] if text.isascii() else text.split("\n")
        for is_ascii, group in groupby(lines, str.isascii):
            run = "\n".join(group)
            if is_ascii and not _CONTROL.search(run):
                yield True, run.lower() if self._lowercase else run
            else:
                yield False, run

    def _without_special(self, text: str) -> np.ndarray:
        """Some models hold their special tokens as ordinary vocabulary: spell the literals apart for them."""
        for literal in self._literals:
            text = text.replace(literal, f"{literal[0]} {literal[1:]}")
        tokens = self._encode([text])[0]
        return np.append(tokens[:-1][~self._is_forbidden[tokens[:-1]]], tokens[-1])
