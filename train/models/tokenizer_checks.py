"""The tokenizer beside a model: can it be used with it, and do its ids mean what those in the shards mean?"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from data_prep.shard_format.tokenizer_info import TokenizerInfo, tokenizer_fingerprint
from train.errors import UserError, one_line
from train.models.encoder_config import COPY_AGAIN, read_tokenizer

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")


def load_tokenizer(name: str, config: Any) -> Any:
    """The tokenizer beside a model.

    Raises:
        UserError: it cannot be read, cannot pad, or knows tokens that the model has no embedding for.
    """
    tokenizer = read_tokenizer(name)
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"{name}: its tokenizer has no padding token, so that texts cannot be batched; give its pad_token in "
            "tokenizer_config.json"
        )
    try:
        tokenizer("a", "a")
    except BaseException as error:  # a panic of tokenizers, which is no Exception and has no class to import
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{name}: the post_processor in its tokenizer.json names a token that it does not define "
            f"({one_line(error)}); {COPY_AGAIN}"
        ) from None
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise UserError(
            f"{name}: its tokenizer goes up to token {largest}, its model has {config.vocab_size} embeddings; give a "
            "folder whose tokenizer and weights belong together"
        )
    return tokenizer


def folder_fingerprint(path_or_hub: str) -> str | None:
    """Fingerprint of the tokenizer beside a model; None where there is none that can be compared. UserError where a
    folder's cannot be read."""
    folder = Path(path_or_hub)
    if folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES[:3]):
        return None
    try:
        tokenizer = read_tokenizer(path_or_hub)
    except UserError as error:
        if folder.is_dir():
            raise UserError(
                f"{error}, or take its tokenizer's files out to go on without comparing them"
            ) from None
        _say_not_compared(path_or_hub, error)
        return None
    try:
        return tokenizer_fingerprint(tokenizer)
    except UserError as error:  # it has no `tokenizers` backend
        _say_not_compared(path_or_hub, error)
        return None


def _say_not_compared(name: str, reason: UserError) -> None:
    logger.warning("%s: its tokenizer cannot be compared: %s", name, one_line(reason))


def special_ids(tokenizer: TokenizerInfo) -> dict[str, int]:
    """By their names in a Hugging Face config."""
    return {
        "pad_token_id": tokenizer.pad_id,
        "cls_token_id": tokenizer.cls_id,
        "sep_token_id": tokenizer.sep_id,
        "mask_token_id": tokenizer.mask_id,
        "bos_token_id": tokenizer.cls_id,
        "eos_token_id": tokenizer.sep_id,
    }


def check_vocabulary(
    name: str, config: Any, fingerprint: str | None, tokenizer: TokenizerInfo, key: str = "teacher"
) -> None:
    """Refuse a model whose token ids do not mean what those in the shards mean.

    Args:
        name: of the model, for the message.
        config: its Hugging Face config.
        fingerprint: of the tokenizer beside it (`folder_fingerprint`), or None.
        tokenizer: the manifest's record.
        key: that names such a model, for the message.
    """
    remedy = f"write the shards with --tokenizer {name}, or give a {key} with the shards' tokenizer"
    if fingerprint is not None and fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{name} has another tokenizer than the shards (fingerprint {fingerprint[:12]}, shards' "
            f"{tokenizer.fingerprint[:12]}): {remedy}"
        )
    # Some models pad their embedding beyond the tokenizer, which is harmless where the tokenizers are equal.
    padded = fingerprint is not None and config.vocab_size > tokenizer.vocab_size
    if config.vocab_size != tokenizer.vocab_size and not padded:
        raise UserError(
            f"{name} has a vocabulary of {config.vocab_size} tokens, the shards' tokenizer one of "
            f"{tokenizer.vocab_size}: {remedy}"
        )
    for field, expected in special_ids(tokenizer).items() if fingerprint is None else ():
        own = getattr(config, field, None)
        if own is not None and own != expected:
            raise UserError(
                f"{name} has {field} {own}, the shards' tokenizer {expected} in its place: {remedy}"
            )
