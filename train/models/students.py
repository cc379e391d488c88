"""Make a student from a teacher: which of its layers to keep, and what becomes of embeddings and head."""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import MODEL_FOR_MASKED_LM_MAPPING, DistilBertConfig, PretrainedConfig, PreTrainedModel

from train.errors import UserError
from train.models.families import (
    BERT,
    DISTILBERT,
    Family,
    bare_encoder,
    family_of,
    family_of_type,
    has_head,
)
from train.models.narrowing import Importance, choose, narrow_weights, set_sizes

ORIGINAL_LAYERS = (0, 2, 4, 7, 9, 11)
"""Teacher layers of the published DistilBERT (scripts/extract_distilbert.py of the original code)."""

Measured = Callable[[Family, PreTrainedModel], Importance]
"""What each part of a model carries."""

logger = logging.getLogger(__name__)


def default_student_layers(teacher_layers: int) -> int:
    """Half of the teacher's, at least one."""
    return max(1, teacher_layers // 2)


def make_student(
    teacher_model: PreTrainedModel,
    num_layers: int | None = None,
    layer_map: str | Sequence[int] = "every_other",
    *,
    width: int | None = None,
    heads: int | None = None,
    feed_forward: int | None = None,
    measured: Measured | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A trainable fp32 student on the CPU, in train mode.

    BERT becomes DistilBERT, whose positions take in token-type row 0 (DistilBERT has no token types; the original
    code dropped that row); every other family stays what it is. The student has an MLM head where the teacher has
    one. With all the layers and the same width a student computes what its teacher does; a narrower one keeps the
    part of it that matters most (train/models/narrowing.py), and LayerNorms and products over fewer dimensions as
    they come.

    Args:
        num_layers: depth; None for the map's own, which is half of the teacher's except for a list.
        layer_map: "every_other" (evenly spaced from layer 0), "last_of_each" (evenly spaced up to the last),
            "distilbert" (0, 2, 4, 7, 9, 11), a list of teacher layers counted from 0, or "random" (fresh weights
            everywhere).
        width, heads, feed_forward: hidden width, attention heads, feed-forward units; None for the teacher's width,
            heads of its size, and units in proportion.
        measured: what the parts of the student at the teacher's width carry; None keeps the first ones of a narrower
            student, where its shapes alone count.
        seed: of the fresh weights.
    Raises:
        UserError: a depth or a map that does not fit the teacher, with what would.
    """
    config, layers = student_config(teacher_model.config, num_layers, layer_map, width, heads, feed_forward)
    kind: Any = MODEL_FOR_MASKED_LM_MAPPING[type(config)]
    if layer_map == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh: PreTrainedModel = kind(config).train()
            return fresh if has_head(teacher_model) else bare_encoder(fresh)
    wide, _ = student_config(teacher_model.config, num_layers, layer_map)
    student = _inherited(kind(wide), teacher_model, layers)
    if config.to_dict() != wide.to_dict():
        family, narrow = family_of(student), kind(config)
        importance = None if measured is None else measured(family, student)
        kept = choose(family, student.config, narrow.config, importance)
        narrow.load_state_dict(narrow_weights(family, student, narrow, kept))
        student = narrow
    if not has_head(teacher_model):
        student = bare_encoder(student)
    return student.train()


def _inherited(
    student: PreTrainedModel, teacher_model: PreTrainedModel, layers: tuple[int, ...]
) -> PreTrainedModel:
    """The student with the weights of the teacher's `layers`; its head stays fresh where the teacher has none."""
    family = family_of(teacher_model)
    teacher = {name: value.detach().float() for name, value in teacher_model.state_dict().items()}
    if not has_head(teacher_model):  # its names, as they are in a masked language model
        teacher = {f"{family.encoder}.{name}": value for name, value in teacher.items()}
    if family is BERT:
        if teacher_model.config.layer_norm_eps != 1e-12:
            logger.warning(
                "DistilBERT's layer norms use epsilon 1e-12, the teacher's %g: the student starts with a small "
                "difference",
                teacher_model.config.layer_norm_eps,
            )
        weights = _distilbert_weights(teacher, layers)
    else:
        _check_first_layer(family, teacher_model, layers)
        weights = _same_class_weights(family, teacher, layers)
    found = student.load_state_dict(weights, strict=has_head(teacher_model))
    assert all(name.startswith(family_of(student).head) for name in found.missing_keys), found
    return student


def student_config(
    teacher: PretrainedConfig,
    num_layers: int | None = None,
    layer_map: str | Sequence[int] = "every_other",
    width: int | None = None,
    heads: int | None = None,
    feed_forward: int | None = None,
) -> tuple[PretrainedConfig, tuple[int, ...]]:
    """The student's Hugging Face config, and the teacher layers that its own are copied from (or shaped like).

    Args:
        teacher: the teacher's Hugging Face config.
        num_layers, layer_map, width, heads, feed_forward: as for `make_student`, and refused as there.
    """
    family = family_of_type(teacher.model_type)
    teacher_layers = int(getattr(teacher, family.num_layers_field))
    if layer_map == "random":
        layers = _evenly_spaced(teacher_layers, _depth(teacher_layers, num_layers))
    else:
        layers = resolve_layer_map(layer_map, teacher_layers, num_layers)
    if family is BERT:
        config: PretrainedConfig = _distilbert_config(teacher, len(layers))
    else:
        config = _same_class_config(family, teacher, layers)
    set_sizes(
        config, family_of_type(config.model_type), width, heads, feed_forward, inherits=layer_map != "random"
    )
    return config, layers


def resolve_layer_map(
    layer_map: str | Sequence[int], teacher_layers: int, num_layers: int | None = None
) -> tuple[int, ...]:
    """The teacher layers, counted from 0, that the student's layers are copied from.

    >>> resolve_layer_map("every_other", 12)
    (0, 2, 4, 6, 8, 10)
    >>> resolve_layer_map("every_other", 12, 4)
    (0, 3, 6, 9)
    >>> resolve_layer_map("last_of_each", 12)
    (1, 3, 5, 7, 9, 11)
    """
    if _depth(teacher_layers, num_layers) > teacher_layers:
        raise UserError(
            f"model.student_layers is {num_layers} but the teacher has only {teacher_layers} layers to copy; "
            f"give at most {teacher_layers}, or model.layer_map=random"
        )
    if isinstance(layer_map, str):
        return _named_layer_map(layer_map, teacher_layers, num_layers)
    try:
        layers = tuple(operator.index(layer) for layer in layer_map)
    except TypeError:
        raise UserError(
            f"model.layer_map {list(layer_map)}: give whole numbers, the teacher's layers counted from 0"
        ) from None
    wrong = [layer for layer in layers if not 0 <= layer < teacher_layers]
    if wrong or not layers:
        raise UserError(
            f"model.layer_map {list(layers)} names layers {wrong} that the teacher does not have; "
            f"its layers are 0 to {teacher_layers - 1}"
        )
    if num_layers is not None and num_layers != len(layers):
        raise UserError(
            f"model.student_layers is {num_layers} but model.layer_map lists {len(layers)} layers; "
            "leave model.student_layers out or make them agree"
        )
    if len(layers) > teacher_layers:
        raise UserError(
            f"model.layer_map lists {len(layers)} layers but the teacher has only {teacher_layers}; "
            f"list at most {teacher_layers}, or give model.layer_map=random"
        )
    return layers


def _depth(teacher_layers: int, num_layers: int | None) -> int:
    """Of the student; half of the teacher's where it is not given. UserError below 1."""
    if num_layers is not None and num_layers < 1:
        raise UserError(f"model.student_layers is {num_layers}; give at least 1")
    return default_student_layers(teacher_layers) if num_layers is None else num_layers


def _evenly_spaced(teacher_layers: int, depth: int, last: bool = False) -> tuple[int, ...]:
    """The first layer of each of `depth` groups of like size, or the last one."""
    return tuple((index + last) * teacher_layers // depth - last for index in range(depth))


def _named_layer_map(name: str, teacher_layers: int, num_layers: int | None) -> tuple[int, ...]:
    if name in ("every_other", "last_of_each"):
        return _evenly_spaced(teacher_layers, _depth(teacher_layers, num_layers), last=name == "last_of_each")
    if name == "distilbert":
        if teacher_layers != 12 or num_layers not in (None, len(ORIGINAL_LAYERS)):
            raise UserError(
                f"model.layer_map=distilbert copies layers {list(ORIGINAL_LAYERS)} of a 12-layer teacher into "
                f"6; this is {num_layers or 6} layers from {teacher_layers}; use every_other or a list"
            )
        return ORIGINAL_LAYERS
    raise UserError(
        f"model.layer_map is {name!r}; choose every_other, last_of_each, distilbert, random or a list of layers"
    )


def _distilbert_config(config: PretrainedConfig, num_layers: int) -> DistilBertConfig:
    student_config = DistilBertConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        n_layers=num_layers,
        n_heads=config.num_attention_heads,
        dim=config.hidden_size,
        hidden_dim=config.intermediate_size,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        activation=config.hidden_act,
        initializer_range=config.initializer_range,
        pad_token_id=config.pad_token_id,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    student_config._attn_implementation = "sdpa"
    return student_config


def _same_class_config(
    family: Family, teacher: PretrainedConfig, layers: tuple[int, ...]
) -> PretrainedConfig:
    config = copy.deepcopy(teacher)
    setattr(config, family.num_layers_field, len(layers))
    for name, value in family.config_for_depth(teacher, layers).items():
        setattr(config, name, value)
    config._attn_implementation = family.attention
    config.dtype = torch.float32
    return config


def _distilbert_weights(teacher: dict[str, torch.Tensor], layers: tuple[int, ...]) -> dict[str, torch.Tensor]:
    state = {
        "distilbert.embeddings.word_embeddings.weight": teacher["bert.embeddings.word_embeddings.weight"],
        "distilbert.embeddings.position_embeddings.weight": teacher[
            "bert.embeddings.position_embeddings.weight"
        ]
        + teacher["bert.embeddings.token_type_embeddings.weight"][0],
    }
    modules = {"distilbert.embeddings.LayerNorm": "bert.embeddings.LayerNorm"}
    head = {
        "vocab_transform": "cls.predictions.transform.dense",
        "vocab_layer_norm": "cls.predictions.transform.LayerNorm",
        "vocab_projector": "cls.predictions.decoder",
    }
    modules |= {name: source for name, source in head.items() if f"{source}.weight" in teacher}
    within_layer = {
        "attention.q_lin": "attention.self.query",
        "attention.k_lin": "attention.self.key",
        "attention.v_lin": "attention.self.value",
        "attention.out_lin": "attention.output.dense",
        "sa_layer_norm": "attention.output.LayerNorm",
        "ffn.lin1": "intermediate.dense",
        "ffn.lin2": "output.dense",
        "output_layer_norm": "output.LayerNorm",
    }
    for index, layer in enumerate(layers):
        for name, source in within_layer.items():
            modules[f"{DISTILBERT.layers}.{index}.{name}"] = f"{BERT.layers}.{layer}.{source}"
    for name, source in modules.items():
        state[f"{name}.weight"] = teacher[f"{source}.weight"]
        state[f"{name}.bias"] = teacher[f"{source}.bias"]
    return state


def _same_class_weights(
    family: Family, teacher: dict[str, torch.Tensor], layers: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    prefix = f"{family.layers}."
    state = {name: value for name, value in teacher.items() if not name.startswith(prefix)}
    for index, layer in enumerate(layers):
        source = f"{prefix}{layer}."
        state |= {
            f"{prefix}{index}.{name.removeprefix(source)}": value
            for name, value in teacher.items()
            if name.startswith(source)
        }
    return state


def _check_first_layer(family: Family, teacher_model: PreTrainedModel, layers: tuple[int, ...]) -> None:
    """Layer 0 of ModernBERT lacks the norm that the others have, so it cannot change places with them."""
    teacher_layers = family.layer_list(teacher_model)
    parameters = [{name for name, _ in layer.named_parameters()} for layer in teacher_layers]
    for index, layer in enumerate(layers):
        if parameters[layer] != parameters[index]:
            raise UserError(
                f"model.layer_map {list(layers)} puts layer {layer} of this {family.model_type} in place "
                f"{index}, but the two are built differently; keep layer 0 first and nowhere else"
            )
