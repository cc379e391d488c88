"""What a Hugging Face config tells of an encoder of text, of whatever family: whether it is one, and what it reads."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from train.families import FAMILIES

PADDING_OFFSET = ("camembert", "xlm-roberta-xl", "roberta-prelayernorm", "longformer", "mpnet")
"""Model types outside `FAMILIES` whose positions start behind the padding's, as RoBERTa's do."""


def read_encoder_config(name: str | Path) -> Any:
    """The config of a Hugging Face folder, or of a name on the hub.

    Raises:
        ValueError: it cannot be read, or the model is no encoder of text.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name}: its config cannot be read: {one_line(error)}") from None
    is_decoder = getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False)
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or is_decoder:
        kind = f"{config.model_type} decoder" if is_decoder else config.model_type
        raise ValueError(
            f"{name} is a {kind}, which is no encoder of text; give a BERT, DistilBERT, RoBERTa or the like"
        )
    return config


def max_positions(config: Any) -> int | None:
    """Longest input in tokens, special ones included, that positions allow; None where the config has no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if not positions:
        return None
    family = FAMILIES.get(config.model_type)
    if family is not None:
        return int(positions) - family.first_position(config)
    return int(positions) - (config.pad_token_id + 1 if config.model_type in PADDING_OFFSET else 0)


def takes_token_types(model: PreTrainedModel) -> bool:
    """Whether the two texts of a pair are told apart by token types."""
    known = inspect.signature(model.forward).parameters
    return "token_type_ids" in known and (getattr(model.config, "type_vocab_size", 0) or 0) > 1


def one_line(error: BaseException) -> str:
    """A library's message on one line, shortened; the error's name where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
