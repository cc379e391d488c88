"""Texts to token ids with a Hugging Face fast tokenizer's backend."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.shard_format import TokenizerInfo, token_dtype
from data_prep.texts import BadRecord, Text, new_digest, pieces_of, utf8

BATCH_CHARACTERS = 1 << 20
BATCH_PIECES = 1024


@dataclass(frozen=True)
class Encoded:
    """A document: its digest (16 bytes) and its tokens, the separator last; or what is wrong with it."""

    record: int
    digest: bytes
    tokens: np.ndarray
    problem: str | None = None


class Encoder:
    """Tokenises documents in batches; made from text, so that it can be sent to other processes."""

    def __init__(self, backend: str, info: TokenizerInfo) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_str(backend)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # "[SEP]" in a text is three ordinary tokens, not the end of a document.
        self._tokenizer.encode_special_tokens = True
        self._dtype = token_dtype(info.vocab_size)
        self._separator = info.sep_id
        forbidden = set(info.special_ids) - {info.unk_id}
        self._is_forbidden = np.zeros(info.vocab_size, dtype=bool)
        self._is_forbidden[list(forbidden)] = True
        added = json.loads(backend).get("added_tokens", [])
        self._literals = [token["content"] for token in added if token["id"] in forbidden]

    def encode(self, texts: Iterable[tuple[int, Text]]) -> Iterator[Encoded]:
        """Encode (number, text) pairs, in order; the numbers come back with the results."""
        batch: list[tuple[int, bytes, list[str]]] = []
        characters = pieces = 0
        for number, text in texts:
            digest = new_digest()
            held: list[str] = []
            done: list[np.ndarray] = []
            size = 0
            try:
                for piece in pieces_of(text):
                    digest.update(utf8(piece))
                    held.append(piece)
                    size += len(piece)
                    if size > BATCH_CHARACTERS:  # a long document: its tokens are all that is kept of it
                        done.append(self._part(held))
                        held, size = [], 0
            except BadRecord as error:
                yield Encoded(number, b"", np.empty(0, self._dtype), str(error))
                continue
            if done:
                yield from self._flush(batch)
                batch, characters, pieces = [], 0, 0
                end = np.array([self._separator], self._dtype)
                yield Encoded(number, digest.digest(), np.concatenate([*done, self._part(held), end]))
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
        encodings = iter(
            self._tokenizer.encode_batch_fast(
                [piece for pieces in documents for piece in pieces], add_special_tokens=False
            )
        )
        ids: list[int] = []
        lengths = []
        for pieces in documents:
            before = len(ids)
            for _ in pieces:
                ids += next(encodings).ids
            ids.append(self._separator)
            lengths.append(len(ids) - before)
        return np.array(ids, dtype=self._dtype), lengths

    def _part(self, pieces: list[str]) -> np.ndarray:
        """The tokens of a part of a long document, without separator."""
        tokens = self._encode([pieces])[0]
        return (self._without_special(pieces) if self._is_forbidden[tokens[:-1]].any() else tokens)[:-1]

    def _without_special(self, pieces: list[str]) -> np.ndarray:
        """Some models hold their special tokens as ordinary vocabulary: spell the literals apart for them."""
        for literal in self._literals:
            pieces = [piece.replace(literal, f"{literal[0]} {literal[1:]}") for piece in pieces]
        tokens = self._encode([pieces])[0]
        return np.append(tokens[:-1][~self._is_forbidden[tokens[:-1]]], tokens[-1])
