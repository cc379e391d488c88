"""What training needs to know of a tokenizer, read off a Hugging Face fast tokenizer: ids, size, fingerprint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict

from data_prep.shard_format.checks import Text, TokenId, VocabularySize
from data_prep.shard_format.errors import UserError

_HIGHEST_TOKEN_ID = 10_000_000


@dataclass(frozen=True)
class TokenizerInfo:
    """As the manifest records it; `special_ids` are all its special ids, ascending."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    fingerprint: Text
    vocab_size: VocabularySize
    pad_id: TokenId
    unk_id: TokenId
    cls_id: TokenId
    sep_id: TokenId
    mask_id: TokenId
    special_ids: tuple[TokenId, ...]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over what decides a Hugging Face fast tokenizer's ids: 64 hex digits.

    Vocabulary, special ids, normalisation, pre-tokenisation and the model count; truncation, padding,
    post-processing, names and model_max_length do not, so the fingerprint survives save_pretrained and
    from_pretrained, and equals that of a teacher folder with an equivalent tokenizer.
    """
    return hashlib.sha256(json.dumps(_identity(tokenizer), sort_keys=True).encode()).hexdigest()


def _identity(tokenizer: Any) -> dict[str, Any]:
    backend = json.loads(_backend(tokenizer).to_str())
    model = dict(backend["model"])
    # get_vocab() has it, with the added tokens; Unigram's list carries scores and stays.
    if isinstance(model.get("vocab"), dict):
        del model["vocab"]
    return {
        "vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0])),
        "special": _special_ids(tokenizer),
        "normalizer": backend["normalizer"],
        "pre_tokenizer": backend["pre_tokenizer"],
        "model": model,
    }


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{type(tokenizer).__name__} is not a fast tokenizer (no `tokenizers` backend); save one with a "
            "tokenizer.json, for example AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return backend


def _special_ids(tokenizer: Any) -> dict[str, int | None]:
    names = ("pad", "unk", "cls", "sep", "mask")
    try:
        return {name: getattr(tokenizer, f"{name}_token_id") for name in names}
    except RecursionError:  # of transformers, which looks up the unknown token's id by it
        raise UserError(
            f"its unk_token {tokenizer.unk_token!r} is not in its vocabulary; correct it in tokenizer_config.json"
        ) from None


def check_token_ids(tokenizer: Any) -> None:
    """UserError for an id that no vocabulary has: `tokenizers` would walk up to it, for minutes."""
    entry, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", 0))
    if highest > _HIGHEST_TOKEN_ID:
        raise UserError(
            f"its token {entry!r} has the id {highest}; ids go up to {_HIGHEST_TOKEN_ID:,}: write it again"
        )


def tokenizer_info(tokenizer: Any) -> TokenizerInfo:
    """The record of a Hugging Face fast tokenizer for the manifest.

    Raises:
        UserError: it lacks one of the tokens that masked language modelling needs, or has an id far too high.
    """
    ids = _special_ids(tokenizer)
    missing = [f"{name}_token" for name in ("pad", "unk", "cls", "sep", "mask") if ids[name] is None]
    if missing:
        raise UserError(
            f"the tokenizer has no {', '.join(missing)}: masked language modelling needs equivalents of "
            "[PAD], [UNK], [CLS], [SEP] and [MASK]; choose a BERT-like tokenizer or train one with "
            "data_prep/train_tokenizer.py"
        )
    _backend(tokenizer)
    check_token_ids(tokenizer)
    return TokenizerInfo(
        fingerprint=tokenizer_fingerprint(tokenizer),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        special_ids=tuple(sorted(set(tokenizer.all_special_ids))),
        **{f"{name}_id": int(index) for name, index in ids.items() if index is not None},
    )
