"""Teachers and students of a plan: the real classes on the meta device, which has shapes and no numbers. Nothing is
loaded or downloaded."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM, PreTrainedModel

from train.config import Config
from train.errors import UserError, one_line
from train.models.build import count_parameters, student_of, teacher_names
from train.models.families import bare_encoder
from train.models.flops import ModelShape, shape_of

# What the hub's config.json of each says.
_BERT = {"model_type": "bert", "type_vocab_size": 2, "max_position_embeddings": 512}
_ROBERTA = {"type_vocab_size": 1, "max_position_embeddings": 514}
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_DISTILBERT = {"dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072, "max_position_embeddings": 512}
PUBLISHED: dict[str, dict[str, Any]] = {
    "google-bert/bert-base-uncased": {**_BERT, **_BASE, "vocab_size": 30522},
    "google-bert/bert-base-cased": {**_BERT, **_BASE, "vocab_size": 28996},
    "google-bert/bert-base-multilingual-cased": {**_BERT, **_BASE, "vocab_size": 119547},
    "google-bert/bert-large-uncased": {**_BERT, **_LARGE, "vocab_size": 30522},
    "google-bert/bert-large-cased": {**_BERT, **_LARGE, "vocab_size": 28996},
    "FacebookAI/roberta-base": {"model_type": "roberta", **_ROBERTA, **_BASE, "vocab_size": 50265},
    "FacebookAI/roberta-large": {"model_type": "roberta", **_ROBERTA, **_LARGE, "vocab_size": 50265},
    "FacebookAI/xlm-roberta-base": {"model_type": "xlm-roberta", **_ROBERTA, **_BASE, "vocab_size": 250002},
    "distilbert/distilbert-base-uncased": {"model_type": "distilbert", **_DISTILBERT, "vocab_size": 30522},
}
FAMILIES = ("bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra")
"""Model types for whose activations launch/planner/memory.py has a formula."""


@dataclass(frozen=True)
class PlannedModel:
    """What memory and cost depend on."""

    model_type: str
    layers: int
    width: int
    heads: int
    feed_forward: int
    vocabulary: int
    embedding: int
    """Width of the embeddings."""
    positions: int
    """Rows of the position table."""
    token_types: int
    """Rows of the token-type table; 0 for none."""
    parameters: int
    """Tied ones once, no pooler."""

    @property
    def shape(self) -> ModelShape:
        """As train/models/flops.py counts it."""
        return ModelShape(self.layers, self.width, self.feed_forward, self.vocabulary, self.embedding)


def describe(model: PreTrainedModel) -> PlannedModel:
    """What a plan needs of a model, on whatever device it is."""
    config, shape = model.config, shape_of(model)
    return PlannedModel(
        model_type=config.model_type,
        layers=shape.layers,
        width=shape.width,
        heads=config.num_attention_heads,
        feed_forward=shape.feed_forward,
        vocabulary=shape.vocabulary,
        embedding=shape.embedding,
        positions=config.max_position_embeddings,
        token_types=getattr(config, "type_vocab_size", 0),
        parameters=count_parameters(model),
    )


def model_from_config(name: str, config: Mapping[str, Any]) -> PreTrainedModel:
    """The masked language model that a Hugging Face config describes, on the meta device.

    Raises:
        UserError: a family without a formula here, or a config without a needed entry or with an impossible one.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"{name} is of model type {kind!r}, for which plan.py has no formula; it knows {', '.join(FAMILIES)}"
        )
    own = ("n_layers", "dim", "n_heads", "hidden_dim")
    usual = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    wanted = (*(own if kind == "distilbert" else usual), "vocab_size", "max_position_embeddings")
    missing = [entry for entry in wanted if entry not in config]
    if missing:
        raise UserError(f"{name} lacks {', '.join(missing)}; save the model anew with transformers")
    sizes = {entry: (config[entry], 1) for entry in wanted}
    sizes |= {entry: (config.get(entry, 0), 0) for entry in ("type_vocab_size", "pad_token_id")}
    wrong = [
        f"{entry}={size!r}"
        for entry, (size, smallest) in sizes.items()
        if not isinstance(size, int) or size < smallest
    ]
    if wrong:
        raise UserError(
            f"{name} has {', '.join(wrong)}, where whole numbers above 0 belong; save the model anew with transformers"
        )
    try:
        with torch.device("meta"):
            return AutoModelForMaskedLM.from_config(
                CONFIG_MAPPING[kind].from_dict(dict(config)), trust_remote_code=False
            )
    # A width that no head count divides, an unknown activation: many kinds of errors come of it.
    except Exception as error:
        raise UserError(
            f"{name} describes no {kind} ({one_line(error, 200)}); save the model anew with transformers"
        ) from None


@functools.cache
def published_model(name: str) -> PreTrainedModel:
    """A model of the table, on the meta device."""
    return model_from_config(name, PUBLISHED[name])


def named_model(name: str, key: str = "model.teacher", with_head: bool = True) -> PreTrainedModel:
    """A model by the name a recipe gives it: a local folder, or one of the published ones. On the meta device.

    Args:
        key: that names it, for the message.
        with_head: False: without its MLM head where config.json names a class that has none. Weights are not read.
    Raises:
        UserError: neither (nothing is downloaded to find out), or a config.json that describes no model.
    """
    path = Path(name, "config.json")
    if path.is_file():
        try:
            config = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is no JSON ({error}); save the model anew with transformers") from None
        if not isinstance(config, dict):
            raise UserError(f"{path} holds no JSON object; save the model anew with transformers")
        model = model_from_config(str(path), config)
        kinds = tuple(map(str, config.get("architectures") or ()))
        has_head = any(kind.endswith(("ForMaskedLM", "BertForPreTraining")) for kind in kinds)
        return model if has_head or with_head else bare_encoder(model)
    known = {key.rpartition("/")[2]: key for key in PUBLISHED}
    if name.rpartition("/")[2] in known and not Path(name).exists():
        return published_model(known[name.rpartition("/")[2]])
    raise UserError(
        f"{key}={name!r}: no folder with a config.json, and not in plan.py's table of published shapes "
        f"({', '.join(PUBLISHED)}); nothing is downloaded here: give a local folder, or the name of one like it"
    )


def models_of(
    config: Config, vocabulary: int | None = None
) -> tuple[PreTrainedModel, tuple[PreTrainedModel, ...]]:
    """(the student, the teachers that its objective reads), as a run would make them, on the meta device.

    Args:
        vocabulary: of the shards' tokenizer, where there are shards.
    Raises:
        UserError: a model whose shape is not known, a student that cannot be made of its teacher.
    """
    if config.model.scratch is not None:
        return _from_scratch(dict(config.model.scratch), vocabulary), ()
    key = "model.teacher" if config.model.start_from is None else "model.start_from"
    names = teacher_names(config) if config.model.start_from is None else [config.model.start_from]
    teachers = tuple(named_model(name, key, config.objective.needs_masks) for name in names)
    for name, teacher in zip(names, teachers, strict=True):
        if vocabulary is not None and teacher.config.vocab_size < vocabulary:
            raise UserError(
                f"{key}={name!r} has a vocabulary of {teacher.config.vocab_size} tokens, the shards' tokenizer "
                f"one of {vocabulary}: write the shards with --tokenizer {name}"
            )
    if config.model.start_from is not None:
        return teachers[0], ()
    with torch.device("meta"):
        student = student_of(teachers[0], config)
    return student, teachers if config.objective.needs_teacher else ()


def _from_scratch(settings: dict[str, Any], vocabulary: int | None) -> PreTrainedModel:
    kind = settings.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"model.scratch: unknown model_type {kind!r}; for example bert or roberta")
    defaults = CONFIG_MAPPING[kind]().to_dict()
    own = {} if vocabulary is None else {"vocab_size": vocabulary}
    return model_from_config("model.scratch", {**defaults, **settings, **own})
