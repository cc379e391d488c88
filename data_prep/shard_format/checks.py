"""The types of a manifest's fields, checked by pydantic. A manifest is input from outside.

It names files that end up in URLs and shell commands, counts that decide how much memory is taken, and ids
that index tables: everything is checked once, where it is read.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from data_prep.shard_format.errors import UserError

FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*")


def plain_file_name(name: object) -> str:
    """`name`, or UserError where it may do harm behind a folder, in a URL or in a `pipe:` command."""
    if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is not a plain file name: only letters, digits and _ . + = - may stand in it"
        )
    return name


FileName = Annotated[str, BeforeValidator(plain_file_name)]
# Sums of counts stay within int64, and JSON readers in other languages keep them exactly.
Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
# Token ids travel as int32.
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
VocabularySize = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
Sha256 = Annotated[str, Field(strict=True, pattern="^[0-9a-f]{64}$")]
Text = Annotated[str, Field(strict=True)]


def shard_is_consistent(shard: Any) -> Any:
    """`shard`, a ShardInfo, or ValueError."""
    if shard.documents > shard.tokens:
        raise ValueError(f"its documents = {shard.documents} are more than its {shard.tokens} tokens")
    return shard


def tokenizer_is_consistent(tokenizer: Any) -> Any:
    """`tokenizer`, a TokenizerInfo, or ValueError."""
    special, size = tokenizer.special_ids, tokenizer.vocab_size
    for name in ("pad_id", "unk_id", "cls_id", "sep_id", "mask_id"):
        if getattr(tokenizer, name) not in special:
            raise ValueError(f"{name} = {getattr(tokenizer, name)} is not one of special_ids")
    if list(special) != sorted(set(special)) or special[-1] >= size or len(special) == size:
        raise ValueError(
            f"special_ids = {list(special)} must be ascending, below {size}, and fewer than the vocabulary"
        )
    return tokenizer


def first_problem(error: ValidationError) -> str:
    """One line: the first field that is wrong, its value, and what it should be."""
    first = error.errors(include_url=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("missing", "value_error"):
        return f"{place or 'its top level'}: {reason}"
    shown = repr(first["input"])
    return f"{place} = {shown if len(shown) <= 80 else f'{shown[:77]}...'}: {reason}"
