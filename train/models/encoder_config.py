"""What a Hugging Face config tells of an encoder of text, of whatever family: whether it is one, what it reads,
and whether its weights are all there."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from train.errors import UserError, one_line
from train.models.families import FAMILIES

_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")


def read_encoder_config(name: str | Path) -> Any:
    """The config of a Hugging Face folder, or of a name on the hub.

    Raises:
        UserError: it cannot be read, or the model is no encoder of text.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name}: its config cannot be read: {one_line(error)}") from None
    is_decoder = getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False)
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or is_decoder:
        kind = f"{config.model_type} decoder" if is_decoder else config.model_type
        raise UserError(
            f"{name} is a {kind}, which is no encoder of text; give a BERT, DistilBERT, RoBERTa or the like"
        )
    return config


def takes_token_types(model: PreTrainedModel) -> bool:
    """Whether the two texts of a pair are told apart by token types."""
    known = inspect.signature(model.forward).parameters
    return "token_type_ids" in known and (getattr(model.config, "type_vocab_size", 0) or 0) > 1


def listed(names: Sequence[str]) -> str:
    """ "a, b, c, d and 3 more are": the beginning of a sentence about the keys of a checkpoint."""
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(names[:4])}{rest} {'is' if len(names) == 1 else 'are'}"


def _layers_of(model_type: str) -> re.Pattern[str]:
    """What the keys of an encoder's layers look like, with their base model's name before them or without."""
    family = FAMILIES.get(model_type)
    if family is None:
        return _LAYER
    base, _, layers = family.layers.partition(".")
    return re.compile(rf"^(?:{base}\.)?{re.escape(layers)}\.(\d+)\.")


def refuse_gaps(name: str | Path, config: Any, missing: Sequence[str], info: Mapping[str, Any]) -> None:
    """Refuse weights that leave a model partly random, or cut off; transformers only warns of it.

    Args:
        name: of the model, for the messages.
        config: its Hugging Face config.
        missing: keys that must be there and are not.
        info: what `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)` returned.
    Raises:
        UserError: a key has another shape than by the config, is missing, or belongs to a layer beyond the config's.
    """
    together = "give a folder whose weights and config belong together"
    for key, found, expected in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{name}: {key} has shape {tuple(found)}, by its config.json {tuple(expected)}; {together}"
        )
    if missing:
        raise UserError(
            f"{name} is incomplete: {listed(missing)} missing from its weights; give a whole checkpoint"
        )
    pattern = _layers_of(config.model_type)
    layers = [int(found[1]) for key in info["unexpected_keys"] if (found := pattern.search(key))]
    if max(layers, default=-1) >= config.num_hidden_layers:  # others are something else's: an adapter's, say
        raise UserError(
            f"{name}: its weights have {max(layers) + 1} layers, its config.json {config.num_hidden_layers}; {together}"
        )
