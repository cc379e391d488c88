"""Encoders from Hugging Face folders, with a new head for a task: nothing below the head is left at random."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from train.errors import UserError, one_line
from train.models.encoder_config import listed, read_encoder_config, refuse_gaps
from train.models.families import max_positions

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "*.safetensors.index.json", "*.bin.index.json")


def check_encoder(name: str) -> Any:
    """The config of an encoder's folder (or hub name), after cheap refusals.

    Raises:
        FileNotFoundError: there is no such folder.
        UserError: no config, tokenizer or weights in it, or the model is no encoder.
    """
    folder = Path(name)
    if folder.is_dir():
        _check_files(folder)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
        raise FileNotFoundError(f"there is no model folder {name}")
    return read_encoder_config(name)


def _check_files(folder: Path) -> None:
    remedy = "give the Hugging Face folder of a model, such as RUN/student"
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; {remedy}")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES[:3])}); {remedy}")
    if not any(any(folder.glob(name)) for name in WEIGHTS):
        raise UserError(f"{folder} has no weights (model.safetensors); {remedy}")


def load_tokenizer(name: str, config: Any) -> Any:
    """The tokenizer beside a model.

    Raises:
        UserError: it cannot be read, cannot pad, or knows tokens that the model has no embedding for.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    # Of a broken file come KeyErrors, and bare Exceptions from tokenizers.
    except Exception as error:
        raise UserError(f"{name}: its tokenizer cannot be read: {one_line(error)}") from None
    if tokenizer.pad_token_id is None:
        raise UserError(f"{name}: its tokenizer has no padding token; texts cannot be batched")
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise UserError(
            f"{name}: its tokenizer goes up to token {largest}, its model has {config.vocab_size} embeddings; give a "
            "folder whose tokenizer and weights belong together"
        )
    return tokenizer


def load_with_new_head(name: str, kind: Any, seed: int, head: Mapping[str, Any]) -> PreTrainedModel:
    """A model with a new head, drawn from `seed`, over the encoder of a folder, in fp32.

    Args:
        kind: AutoModelForSequenceClassification or AutoModelForQuestionAnswering.
        head: fields of the config, such as num_labels.
    Raises:
        UserError: weights of the encoder are missing, of the wrong shape, or more than its config says.
    """
    try:
        encoder, info = AutoModel.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    # safetensors, pickle and torch have an error each for a damaged file.
    except Exception as error:
        raise UserError(f"{name}: its weights cannot be read: {one_line(error)}") from None
    missing = sorted(info["missing_keys"])
    refuse_gaps(name, encoder.config, [key for key in missing if "pooler." not in key], info)
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(name, **head)
    config.dtype = torch.float32
    model = kind.from_config(config)
    wanted = model.base_model.state_dict()
    loaded = {
        key: value for key, value in encoder.state_dict().items() if key in wanted and key not in missing
    }
    without = [key for key in wanted if key not in loaded and "pooler." not in key]
    assert not without, without
    model.base_model.load_state_dict(loaded, strict=False)
    return model


def load_finetuned(name: str, kind: Any) -> PreTrainedModel:
    """A model whose head is trained already, in fp32 and eval mode.

    Raises:
        UserError: weights are missing, the head's among them.
    """
    try:
        model, info = kind.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:
        raise UserError(f"{name}: its weights cannot be read: {one_line(error)}") from None
    missing = sorted(info["missing_keys"])
    if missing and all(
        not key.startswith(f"{model.base_model_prefix}.") or "pooler." in key for key in missing
    ):
        raise UserError(
            f"{name} is not fine-tuned: {listed(missing)} missing from its weights; fine-tune it on the task first "
            "and give OUT/TASK/seed-N"
        )
    refuse_gaps(name, model.config, missing, info)
    return model.eval().requires_grad_(False)


def longest_input(config: Any, tokenizer: Any) -> int:
    """Tokens, special ones included, that both the model and its tokenizer allow."""
    longest = int(tokenizer.model_max_length)
    positions = max_positions(config)
    return longest if positions is None else min(longest, positions)


def weights_digest(name: str) -> str:
    """SHA-256 over a folder's config, tokenizer and weights; of a hub name, the name itself."""
    digest = hashlib.sha256(b"" if Path(name).is_dir() else name.encode())
    suffixes = (".safetensors", ".bin", ".json", ".txt", ".model")
    files = [path for path in Path(name).iterdir() if path.suffix in suffixes] if Path(name).is_dir() else []
    for path in sorted(files):
        if path.name == "scores.json":
            continue
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
