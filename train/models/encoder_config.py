"""Read the config and the tokenizer of a Hugging Face folder, and no code of its; what they say of a model: whether it
is an encoder of text, how long its input may be."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import cached_file

from data_prep.shard_format.files import parse_json, read_file, read_json, refuse_pipe, write_json
from data_prep.shard_format.hub import require_hub
from data_prep.shard_format.tokenizer_info import check_token_ids
from train.errors import UserError, one_line
from train.models.families import POSITIONS_AFTER_PADDING, max_positions

COPY_AGAIN = "copy the folder again"
MOST = {
    "num_hidden_layers": 1000,
    "n_layers": 1000,
    "num_attention_heads": 1000,
    "n_heads": 1000,
    "hidden_size": 2**16,
    "dim": 2**16,
    "intermediate_size": 2**20,
    "hidden_dim": 2**20,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**24,
}
"""Numbers of a config of which there is at least one, and what no encoder has more of: transformers would make layers
one by one until the memory is full."""


def read_config(name: str | Path) -> Any:
    """The config of a Hugging Face folder, or of a name on the hub; none of its code is ever run.

    Raises:
        UserError: there is no such folder; its config cannot be read, names code of its own, or has a value that no
            model can be made of.
    """
    if str(name).startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UserError(f"there is no model folder {name}; give a Hugging Face folder or a name on the hub")
    if not Path(name).exists():
        require_hub(
            f"the model {name}", lambda: isinstance(try_to_load_from_cache(str(name), "config.json"), str)
        )
    try:
        refuse_pipes(name)
        settings, _ = PreTrainedConfig.get_config_dict(name)
        if "auto_map" in settings:
            raise UserError(
                f"{name}: its config.json asks for code of its own (auto_map), and code of a model's folder is never "
                "run here; give a model of transformers' own classes. If it is one, saved with needless code, take "
                "auto_map out of its config.json"
            )
        _refuse_values(name, settings)
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except UserError:
        raise
    # Of a value of a wrong type come errors of many kinds.
    except Exception as error:
        raise UserError(
            f"{name}: its config cannot be read: {one_line(error)}; give a folder as save_pretrained writes it"
        ) from None


def read_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder, or of a name on the hub; none of its code is ever run. UserError where it
    cannot be read."""
    try:
        refuse_pipes(name)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        check_token_ids(tokenizer)
    # Of a broken file come KeyErrors, and bare Exceptions from tokenizers.
    except Exception as error:
        reason = f"{one_line(error)}; {COPY_AGAIN}"
        if "trust_remote_code" in str(error):
            reason = (
                "it asks for code of its own, which is never run here; give one of transformers' own classes"
            )
        raise UserError(f"{name}: its tokenizer cannot be read: {reason}") from None
    limit = tokenizer.model_max_length
    if type(limit) not in (int, float) or not 1 <= limit < math.inf:
        raise UserError(
            f"{name}: model_max_length in its tokenizer_config.json is {limit!r:.80}; give a number of tokens, "
            "or take it out"
        )
    return tokenizer


def read_json_beside(name: str, file: str) -> Any:
    """A JSON file beside a model, of a Hugging Face folder or of a name on the hub; None where there is none."""
    path = cached_file(
        name,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else parse_json(read_file(path), path, COPY_AGAIN)


def _refuse_values(name: str | Path, settings: Mapping[str, Any]) -> None:
    """What transformers' own check of types lets pass, and breaks or changes a model later."""
    limits = {key: (1, most) for key, most in MOST.items() if key in settings}
    needs_padding = settings.get("model_type") in POSITIONS_AFTER_PADDING and "pad_token_id" in settings
    if needs_padding or isinstance(settings.get("pad_token_id"), int):
        limits["pad_token_id"] = (0, settings.get("vocab_size", MOST["vocab_size"]) - 1)
    for key, (least, most) in limits.items():
        if type(settings[key]) is not int or not least <= settings[key] <= most:
            _refuse(name, key, settings[key], f"a whole number from {least} to {most:,}")
    spread = settings.get("initializer_range")  # other types are refused by transformers
    if isinstance(spread, int | float) and not 0 <= spread < math.inf:
        _refuse(name, "initializer_range", spread, "a number of at least 0")
    for key, rate in settings.items():
        if "dropout" in key and isinstance(rate, int | float) and not 0 <= rate < 1:
            _refuse(name, key, rate, "a share of at least 0 and less than 1")


def _refuse(name: str | Path, key: str, value: Any, wanted: str) -> None:
    raise UserError(
        f"{name}: its config.json has {key} {str(value)[:60]!r}, where {wanted} belongs; give a folder as "
        "save_pretrained writes it"
    )


def read_encoder_config(name: str | Path) -> Any:
    """`read_config`, of an encoder of text; UserError where the model is another kind."""
    config = read_config(name)
    refuse_decoder(name, config)
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        _refuse_kind(name, config.model_type)
    return config


def refuse_decoder(name: str | Path, config: Any) -> None:
    """UserError for a model whose tokens do not see those behind them."""
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False):
        _refuse_kind(name, f"{config.model_type} decoder")


def _refuse_kind(name: str | Path, kind: str) -> None:
    raise UserError(
        f"{name} is a {kind}, which is no encoder of text; give a BERT, DistilBERT, RoBERTa or the like"
    )


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
