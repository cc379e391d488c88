"""The manifest's record of the tokenizer against the tokenizer that lies beside it.

Every frame and mask is made of the ids in that record, and nothing else in the folder guards them.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from data_prep.shard_format.errors import UserError
from data_prep.shard_format.manifest import MANIFEST_NAME
from data_prep.shard_format.tokenizer_info import TokenizerInfo, tokenizer_info


def check_record(folder: Path, tokenizer: Any, recorded: TokenizerInfo) -> None:
    """Compare every field.

    Args:
        folder: the tokenizer's, beside the manifest.
        tokenizer: the Hugging Face fast tokenizer in it.
        recorded: the manifest's record.
    Raises:
        UserError: they differ, or the tokenizer is none for masked language modelling.
    """
    try:
        found = tokenizer_info(tokenizer)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    for name in (field.name for field in fields(TokenizerInfo)):
        says, has = getattr(recorded, name), getattr(found, name)
        if says != has:
            raise UserError(
                f"{folder.parent / MANIFEST_NAME}: tokenizer.{name} is {says!r}, but {folder} has {has!r}: one of them "
                "was changed after the shards were made; restore it, or remove the folder and run write_shards.py again"
            )
