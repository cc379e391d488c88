"""Sentence vectors of an encoder: how sentence-transformers' files beside it say that its token vectors are pooled.

Read for all-MiniLM-L6-v2 (files of 2021) and as sentence-transformers 6.2 writes them.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError

from data_prep.shard_format.checks import first_problem
from train.config_sections.objective import POOLINGS
from train.errors import UserError
from train.models.encoder_config import COPY_AGAIN, read_json_beside

MODULES = "modules.json"
POOLING = "1_Pooling/config.json"
WITHOUT_WEIGHTS = ("Transformer", "Pooling", "Normalize")
"""Modules that hold no weights of their own, the encoder aside."""
_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


class Module(BaseModel):
    """A part of a sentence-transformers model."""

    path: str
    type: str

    @property
    def is_plain(self) -> bool:
        """Whether its config.json is all there is of it; a folder's name beside the model, or none for the model's."""
        package, _, kind = self.type.rpartition(".")
        own = package.startswith("sentence_transformers.") and kind in WITHOUT_WEIGHTS
        beside = re.fullmatch(r"" if kind == "Transformer" else r"\w[\w.-]*", self.path)
        return own and beside is not None


def sentence_modules(name: str) -> list[Module]:
    """Of a folder or a name on the hub; empty where it is none of sentence-transformers'. UserError: damaged."""
    modules = read_json_beside(name, MODULES)
    try:
        return [] if modules is None else TypeAdapter(list[Module]).validate_python(modules)
    except ValidationError as error:
        raise UserError(f"{name}/{MODULES} is damaged ({first_problem(error)}); {COPY_AGAIN}") from None


def sentence_settings(name: str) -> tuple[str | None, int | None]:
    """Pooling and longest input by sentence-transformers' files beside a model, a folder's or on the hub; None where
    they do not say."""
    settings = _settings(name, POOLING)
    switched = [key for key, on in settings.items() if key.startswith("pooling_mode_") and on is True]
    modes = [_FLAGS.get(key, key) for key in switched] or [str(settings.get("pooling_mode"))]
    longest = _settings(name, "sentence_bert_config.json").get("max_seq_length")
    return (" and ".join(modes) if settings else None), longest if isinstance(longest, int) else None


def _settings(name: str, file: str) -> dict[str, Any]:
    content = read_json_beside(name, file)
    return content if isinstance(content, dict) else {}


def sentence_pooling(teacher: str) -> str:
    """One of POOLINGS: what makes a teacher's sentence vectors of its last hidden states, their length aside.

    Raises:
        UserError: its files do not say, or its vectors are made otherwise.
    """
    others = [module.type for module in sentence_modules(teacher) if not module.is_plain]
    if others:
        raise UserError(
            f"objective.embedding_weight: teacher {teacher} has sentence-transformers' {others[0]}, whose weights or "
            "code make other vectors of the pooled ones; give a teacher of encoder and pooling alone"
        )
    found, _ = sentence_settings(teacher)
    if found is None:
        raise UserError(
            f"objective.embedding_weight: teacher {teacher} has no {POOLING} that says what its sentence vectors are; "
            "give a sentence-transformers model, or objective.cosine_weight in its place for every token's vector"
        )
    if found not in POOLINGS:
        raise UserError(
            f"objective.embedding_weight: teacher {teacher} pools by {found} ({POOLING}); give one that pools by "
            f"{' or '.join(POOLINGS)}"
        )
    return found


def pooled(hidden: torch.Tensor, mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """(B, width) of (B, S, width) hidden states, fp32 (fp64 for fp64 states).

    Args:
        mask: (B, S), non-zero where there is a token; None where there is one everywhere.
        pooling: the mean or maximum over tokens, special ones included, or the first token.
    """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if pooling == "cls":
        return hidden[:, 0]
    places = hidden.new_ones(hidden.shape[:2]) if mask is None else mask
    padding = (places == 0).unsqueeze(-1)
    if pooling == "max":
        return hidden.masked_fill(padding, -torch.inf).amax(dim=1)
    return hidden.masked_fill(padding, 0.0).sum(dim=1) / (~padding).sum(dim=1).clamp_min(1)
