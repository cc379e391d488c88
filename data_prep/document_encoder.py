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

from data_prep.shard_format.manifest import TokenizerInfo, token_dtype
from data_prep.sources.texts import BadRecord, Text, new_digest, pieces_of, utf8

BATCH_CHARACTERS = 1 << 20
BATCH_PIECES = 1024
MAX_DOCUMENT_BYTES = 640_000_000
"""Of one document's tokens: more would break what is promised about memory. 300 MB of punctuation have less."""

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Encoded:
    """A document: its digest (16 bytes) and its tokens, the separator last; or what is wrong with it."""

    record: int
    digest: bytes
    tokens: np.ndarray
    problem: str | None = None


def _ascii_is_easy(content: dict[str, Any]) -> bool:
    """Whether all that the tokenizer's normaliser does to ASCII text is to lower-case it.

    BERT's spends 40 % of the tokenizer's time on taking off accents and parting Chinese characters, which
    ASCII has none of (control characters, which it removes, are left to it). Its pre-tokeniser parts at line
    breaks, so that lines may be told apart. Added words would have to be normalised too: not with these.
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
        from tokenizers import Tokenizer

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

    def encode(self, texts: Iterable[tuple[int, Text]]) -> Iterator[Encoded]:
        """Encode (number, text) pairs, in order; the numbers come back with the results."""
        batch: list[tuple[int, bytes, list[str]]] = []
        characters = pieces = 0
        for number, text in texts:
            digest = new_digest()
            held: list[str] = []
            done: array.array[int] | None = None  # grows in place: joined arrays would be there twice
            size = 0
            try:
                for piece in pieces_of(text):
                    digest.update(utf8(piece))
                    held.append(piece)
                    size += len(piece)
                    if size > BATCH_CHARACTERS:  # a long document: its tokens are all that is kept of it
                        done = self._add_part(done, held)
                        held, size = [], 0
                if done is not None:
                    done = self._add_part(done, held)
            except BadRecord as error:
                yield Encoded(number, b"", np.empty(0, self._dtype), str(error))
                continue
            if done is not None:
                yield from self._flush(batch)
                batch, characters, pieces = [], 0, 0
                done.append(self._separator)
                yield Encoded(number, digest.digest(), np.frombuffer(done, dtype=self._dtype))
                continue
            batch.append((number, digest.digest(), held))
            characters += size
            pieces += len(held)
            if characters > BATCH_CHARACTERS or pieces > BATCH_PIECES:
                yield from self._flush(batch)
                batch, characters, pieces = [], 0, 0
        yield from self._flush(batch)

    def _flush(self, batch: list[tuple[int, bytes, list[str]]]) -> Iterator[Encoded]:
        ids, lengths = self._encode([pieces for _, _, pieces in batch])
        ends = np.cumsum(lengths, dtype=np.int64)
        literals = np.count_nonzero(self._is_forbidden[ids]) > len(batch)  # each document has its separator
        start = 0
        for (number, digest, pieces), end in zip(batch, ends.tolist(), strict=True):
            tokens = ids[start:end]
            if literals and self._is_forbidden[tokens[:-1]].any():
                tokens = self._without_special(pieces)
            yield Encoded(number, digest, tokens)
            start = end

    def _encode(self, documents: list[list[str]]) -> tuple[np.ndarray, list[int]]:
        """The tokens of all documents (lists of pieces), each document followed by the separator."""
        plain: list[str] = []
        easy: list[str] = []
        takes: list[list[bool]] = []
        for pieces in documents:
            takes.append([])
            for is_easy, run in self._runs(pieces):
                (easy if is_easy else plain).append(run)
                takes[-1].append(is_easy)
        encodings = (
            iter(_encode_batch(self._tokenizer, plain)),
            iter(_encode_batch(self._unnormalized, easy)),
        )
        ids = self._empty()
        lengths = []
        for take in takes:
            before = len(ids)
            for is_easy in take:
                ids.fromlist(next(encodings[is_easy]).ids)
            ids.append(self._separator)
            lengths.append(len(ids) - before)
        return np.frombuffer(ids, dtype=self._dtype), lengths

    def _runs(self, pieces: list[str]) -> Iterator[tuple[bool, str]]:
        """Cut pieces into runs of lines that are easy (ASCII, normalised here) and runs that are not."""
        for piece in pieces:
            if self._unnormalized is None:
                yield False, piece
                continue
            lines = [piece] if piece.isascii() else piece.split("\n")
            for is_ascii, run in groupby(lines, str.isascii):
                text = "\n".join(run)
                if is_ascii and not _CONTROL.search(text):
                    yield True, text.lower() if self._lowercase else text
                else:
                    yield False, text

    def _empty(self) -> array.array[int]:
        return array.array("H" if self._dtype.itemsize == 2 else "I")

    def _add_part(self, tokens: array.array[int] | None, pieces: list[str]) -> array.array[int]:
        """Append the tokens of a part of a long document, without separator."""
        tokens = self._empty() if tokens is None else tokens
        part = self._encode([pieces])[0]
        if self._is_forbidden[part[:-1]].any():
            part = self._without_special(pieces)
        tokens.frombytes(part[:-1].view(np.uint8).data)
        if len(tokens) * tokens.itemsize > MAX_DOCUMENT_BYTES:
            raise BadRecord(
                f"a document of more than {MAX_DOCUMENT_BYTES // tokens.itemsize:,} tokens; split it"
            )
        return tokens

    def _without_special(self, pieces: list[str]) -> np.ndarray:
        """Some models hold their special tokens as ordinary vocabulary: spell the literals apart for them."""
        for literal in self._literals:
            pieces = [piece.replace(literal, f"{literal[0]} {literal[1:]}") for piece in pieces]
        tokens = self._encode([pieces])[0]
        return np.append(tokens[:-1][~self._is_forbidden[tokens[:-1]]], tokens[-1])
