"""What a Hugging Face config says of a model: whether it is an encoder of text, how long its input may be."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from data_prep.shard_format.files import read_json, refuse_pipe, write_json
from data_prep.shard_format.hub import require_hub
from train.errors import UserError, one_line
from train.models.families import max_positions


def read_config(name: str | Path) -> Any:
    """The config of a Hugging Face folder, or of a name on the hub; none of its code is ever run.

    Raises:
        UserError: there is no such folder, or its config cannot be read.
    """
    if str(name).startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UserError(f"there is no model folder {name}; give a Hugging Face folder or a name on the hub")
    if not Path(name).exists():
        require_hub(
            f"the model {name}", lambda: isinstance(try_to_load_from_cache(str(name), "config.json"), str)
        )
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name}: its config cannot be read: {one_line(error)}") from None


def read_encoder_config(name: str | Path) -> Any:
    """`read_config`, of an encoder of text.

    Raises:
        UserError: it cannot be read, or the model is another kind.
    """
    config = read_config(name)
    is_decoder = getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False)
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or is_decoder:
        kind = f"{config.model_type} decoder" if is_decoder else config.model_type
        raise UserError(
            f"{name} is a {kind}, which is no encoder of text; give a BERT, DistilBERT, RoBERTa or the like"
        )
    return config


def longest_input(config: Any, tokenizer: Any) -> int:
    """Tokens, special ones included, that both a model and its tokenizer allow."""
    longest = int(tokenizer.model_max_length)
    positions = max_positions(config)
    return longest if positions is None else min(longest, positions)


def write_length_limit(folder: Path, config: Any) -> None:
    """Let the tokenizer in a model's folder cut texts (`truncation=True`) at what the model takes: its own limit may be
    that of another model. Called wherever a model leaves this project with a tokenizer."""
    positions, path = max_positions(config), folder / "tokenizer_config.json"
    if positions is not None:
        settings = read_json(path, "restore it") if path.exists() else {}
        write_json(path, {**settings, "model_max_length": positions})


def takes_token_types(model: PreTrainedModel) -> bool:
    """Whether token types distinguish the two texts of a pair."""
    known = inspect.signature(model.forward).parameters
    return "token_type_ids" in known and (getattr(model.config, "type_vocab_size", 0) or 0) > 1


def refuse_pipes(name: str | Path) -> None:
    """UserError for a named pipe among the files of a folder: transformers would wait for its writer."""
    for path in Path(name).iterdir() if Path(name).is_dir() else ():
        if path.exists():
            refuse_pipe(path)
