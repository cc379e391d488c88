"""Shapes and parameter counts of models, from their configs alone: nothing is loaded or downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.models.flops import ModelShape
from train.models.students import default_student_layers

# What the hub's config.json of each says.
_BERT = {"model_type": "bert", "type_vocab_size": 2, "max_position_embeddings": 512}
_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_ROBERTA = {
    "model_type": "roberta",
    "type_vocab_size": 1,
    "max_position_embeddings": 514,
    "vocab_size": 50265,
}
_DISTILBERT = {
    "model_type": "distilbert",
    "dim": 768,
    "n_layers": 6,
    "n_heads": 12,
    "hidden_dim": 3072,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "google-bert/bert-base-uncased": {**_BERT, **_BASE, "vocab_size": 30522},
    "google-bert/bert-base-cased": {**_BERT, **_BASE, "vocab_size": 28996},
    "google-bert/bert-base-multilingual-cased": {**_BERT, **_BASE, "vocab_size": 119547},
    "google-bert/bert-large-uncased": {**_BERT, **_LARGE, "vocab_size": 30522},
    "google-bert/bert-large-cased": {**_BERT, **_LARGE, "vocab_size": 28996},
    "FacebookAI/roberta-base": {**_ROBERTA, **_BASE},
    "FacebookAI/roberta-large": {**_ROBERTA, **_LARGE},
    "FacebookAI/xlm-roberta-base": {
        **_ROBERTA,
        **_BASE,
        "model_type": "xlm-roberta",
        "vocab_size": 250002,
    },
    "distilbert/distilbert-base-uncased": _DISTILBERT,
}
FAMILIES = ("bert", "distilbert", "roberta", "xlm-roberta")


@dataclass(frozen=True)
class PlannedModel:
    """What memory and cost depend on."""

    model_type: str
    """bert, distilbert, roberta or xlm-roberta."""
    layers: int
    width: int
    heads: int
    feed_forward: int
    vocabulary: int
    positions: int
    """Rows of the position table."""
    token_types: int
    """Rows of the token-type table; 0 for none."""

    @property
    def shape(self) -> ModelShape:
        """As train/models/flops.py counts it."""
        return ModelShape(self.layers, self.width, self.feed_forward, self.vocabulary)


def model_from_config(name: str, config: Mapping[str, Any]) -> PlannedModel:
    """The shape that a Hugging Face config describes.

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
    names = own if kind == "distilbert" else usual
    wanted = (*names, "vocab_size", "max_position_embeddings")
    missing = [entry for entry in wanted if entry not in config]
    if missing:
        raise UserError(f"{name} lacks {', '.join(missing)}; save the model anew with transformers")
    sizes = {entry: config[entry] for entry in wanted}
    sizes["type_vocab_size"] = 0 if kind == "distilbert" else config.get("type_vocab_size", 2)
    wrong = [
        f"{entry}={size!r}"
        for entry, size in sizes.items()
        if not isinstance(size, int) or size < (0 if entry == "type_vocab_size" else 1)
    ]
    if wrong:
        raise UserError(
            f"{name} has {', '.join(wrong)}, where whole numbers above 0 belong; save the model anew with transformers"
        )
    return PlannedModel(kind, *sizes.values())


def named_model(name: str) -> PlannedModel:
    """A model by the name a recipe gives it: a local folder, or one of the published ones.

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
        return model_from_config(str(path), config)
    known = {key.rpartition("/")[2]: key for key in PUBLISHED}
    if name.rpartition("/")[2] in known and not Path(name).exists():
        key = known[name.rpartition("/")[2]]
        return model_from_config(key, PUBLISHED[key])
    raise UserError(
        f"model.teacher={name!r}: no folder with a config.json, and not in plan.py's table of published shapes "
        f"({', '.join(PUBLISHED)}); nothing is downloaded here: give a local folder, or the name of one like it"
    )


def student_of(teacher: PlannedModel, layers: int | None = None, width: int | None = None) -> PlannedModel:
    """The student of train/models/students.py: BERT becomes DistilBERT, the others keep their class.

    Args:
        layers: None for half the teacher's.
        width: of a student of random weights; its heads and inner width shrink with it. None: the teacher's.
    """
    layers = default_student_layers(teacher.layers) if layers is None else layers
    kind = "distilbert" if teacher.model_type == "bert" else teacher.model_type
    student = replace(
        teacher,
        model_type=kind,
        layers=layers,
        token_types=0 if kind == "distilbert" else teacher.token_types,
    )
    if width is None:
        return student
    head = teacher.width // teacher.heads
    if width % head:
        raise UserError(f"model.student_width={width}: give a multiple of the width of a head, {head}")
    return replace(
        student, width=width, heads=width // head, feed_forward=teacher.feed_forward * width // teacher.width
    )


def num_parameters(model: PlannedModel) -> int:
    """Parameters with the masked-language-modelling head, the decoder tied with the embedding, no pooler.

    Per layer of width d and inner width f: 4 d (d + 1) for query, key, value, output; d f + f and f d + d; two
    LayerNorms of 2 d.
    """
    d, f = model.width, model.feed_forward
    layer = 4 * d * (d + 1) + d * f + f + f * d + d + 2 * 2 * d
    embeddings = (model.vocabulary + model.positions + model.token_types) * d + 2 * d
    head = d * (d + 1) + 2 * d + model.vocabulary
    return model.layers * layer + embeddings + head
