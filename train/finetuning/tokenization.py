"""Texts to token ids, once for all seeds."""

from __future__ import annotations

from typing import Any

import numpy as np

from train.errors import UserError
from train.finetuning.examples import Examples

CHUNK = 2000


def encode(
    tokenizer: Any, examples: Examples, max_length: int, token_types: bool
) -> list[dict[str, np.ndarray]]:
    """ "input_ids", and with `token_types` "token_type_ids", each (length,) int32, of every example.

    A pair that is too long loses tokens of its longer text first.
    """
    encoded: list[dict[str, np.ndarray]] = []
    for start in range(0, len(examples), CHUNK):
        second = examples.second[start : start + CHUNK] if examples.second is not None else None
        chunk = tokenizer(
            examples.first[start : start + CHUNK],
            second,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=token_types,
        )
        names = ("input_ids", "token_type_ids") if token_types else ("input_ids",)
        columns = [[np.asarray(ids, dtype=np.int32) for ids in chunk[name]] for name in names]
        encoded += [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return encoded


def check_pairs(name: str, tokenizer: Any) -> None:
    """UserError where a tokenizer puts nothing between the two texts of a pair."""
    ids = tokenizer("a", "a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    single = tokenizer("a")["input_ids"]
    if len(ids) <= len(single) + len(without):
        raise UserError(
            f"{name}: its tokenizer gives a pair of texts as {tokenizer.convert_ids_to_tokens(ids)}, with nothing "
            "between them; give its tokenizer.json a pair template, as BERT's [CLS] A [SEP] B [SEP]"
        )


def check_room(name: str, tokenizer: Any, max_length: int, is_pair: bool) -> None:
    """UserError where `max_length` is all special tokens, and the model would see nothing of the texts."""
    special = tokenizer.num_special_tokens_to_add(pair=is_pair)
    least = special + (2 if is_pair else 1)
    if max_length < least:
        raise UserError(
            f"--max-length is {max_length}, of which {name} takes {special} for special tokens; give at least {least}"
        )
