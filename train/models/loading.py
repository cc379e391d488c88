"""Load masked language models from Hugging Face folders, refusing what would train on noise."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from data_prep.shard_format.manifest import TokenizerInfo, tokenizer_fingerprint
from train.errors import UserError, one_line
from train.models.encoder_config import listed, refuse_gaps
from train.models.families import family_of_type

logger = logging.getLogger(__name__)


def load_masked_lm(path_or_hub: str, config: Any = None) -> PreTrainedModel:
    """A masked language model with SDPA attention, fp32 on the CPU, every weight from the checkpoint.

    transformers only warns when weights are missing and leaves them random; a teacher with a random head
    would teach noise, so that is an error here.

    Args:
        path_or_hub: a Hugging Face folder or a name on the hub.
        config: its Hugging Face config, where that has been read before.
    Raises:
        UserError: it looks like a folder, and there is none; the architecture is not supported; weights are missing
            or of the wrong shape.
        OSError: nothing to load there (from transformers).
    """
    if path_or_hub.startswith((".", "/", "~")) and not Path(path_or_hub).is_dir():
        raise UserError(f"there is no model folder {path_or_hub}; give the folder of a masked language model")
    config = config or AutoConfig.from_pretrained(path_or_hub)
    family = family_of_type(config.model_type)
    try:
        with _quiet_transformers():
            model, info = AutoModelForMaskedLM.from_pretrained(
                path_or_hub,
                config=config,
                dtype=torch.float32,
                attn_implementation="sdpa",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
            )
    except (RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path_or_hub}: its weights cannot be read: {one_line(error)}") from None
    missing = sorted(info["missing_keys"])
    if any(name.startswith(family.head) for name in missing):
        kinds = ", ".join(config.architectures or ["no architecture"])
        raise UserError(
            f"{path_or_hub} has no MLM head: {listed(missing)} missing from its weights (its config.json "
            f"names {kinds}); give a checkpoint that was saved with its masked-language-model head"
        )
    refuse_gaps(path_or_hub, config, missing, info)
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bar and table of missing keys, which would be repeated by every rank."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def folder_fingerprint(path_or_hub: str) -> str | None:
    """Fingerprint of the tokenizer beside a model; None where there is none that can be compared."""
    if Path(path_or_hub).is_dir() and not any(
        Path(path_or_hub, name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
    ):
        return None
    try:
        return tokenizer_fingerprint(AutoTokenizer.from_pretrained(path_or_hub))
    # Of a broken file come KeyErrors, and bare Exceptions from tokenizers.
    except Exception as error:
        logger.warning("%s: its tokenizer cannot be compared: %s", path_or_hub, one_line(error))
        return None


def check_vocabulary(name: str, config: Any, fingerprint: str | None, tokenizer: TokenizerInfo) -> None:
    """Refuse a model whose token ids do not mean what those in the shards mean.

    Args:
        name: of the model, for the message.
        config: its Hugging Face config.
        fingerprint: of the tokenizer beside it (`folder_fingerprint`), or None.
        tokenizer: the manifest's record.
    """
    remedy = f"write the shards with --tokenizer {name}, or give a teacher with the shards' tokenizer"
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
    special = {
        "pad": tokenizer.pad_id,
        "cls": tokenizer.cls_id,
        "sep": tokenizer.sep_id,
        "mask": tokenizer.mask_id,
        "bos": tokenizer.cls_id,
        "eos": tokenizer.sep_id,
    }
    for kind, expected in special.items() if fingerprint is None else ():
        own = getattr(config, f"{kind}_token_id", None)
        if own is not None and own != expected:
            raise UserError(
                f"{name} has {kind}_token_id {own}, the shards' tokenizer {expected} in its place: {remedy}"
            )
