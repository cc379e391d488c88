"""Where each architecture keeps what distillation needs: encoder, MLM transform, decoder, layers, positions.

A family is a small table entry; the rest of the project never asks for a model's class. To add one, write
a `Family` with its attribute paths (see `MODERNBERT`) and list it in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from train.errors import UserError


@dataclass(frozen=True)
class EncoderOutput:
    """Hidden states of one forward pass."""

    last_hidden: torch.Tensor
    """(batch, sequence, width) of the last layer, after any final norm: what the MLM head reads."""
    hidden_states: tuple[torch.Tensor, ...]
    """num_layers + 1 tensors like `last_hidden`, the embeddings' output first; none if not asked for."""


@dataclass(frozen=True)
class DecoderInputs:
    """One model's decoder and the features of the tokens whose logits are wanted."""

    features: torch.Tensor
    """(N, width), any float dtype."""
    weight: torch.Tensor
    """(vocabulary, width)."""
    bias: torch.Tensor | None
    """(vocabulary,)."""
    share: float = 1.0
    """Weight in an ensemble's average; the shares of one ensemble add up to 1."""
    from_bf16: bool = False
    """Features and weight hold bf16 numbers in a wider format: their products may be computed from bf16."""

    def of(self, tokens: slice) -> DecoderInputs:
        """The same decoder with a part of the tokens."""
        return replace(self, features=self.features[tokens])

    def in_dtype(self, dtype: torch.dtype) -> DecoderInputs:
        """Operands of the matrix products whose results are wanted in `dtype`.

        Half precision stays as it is on a GPU, whose products of it are summed and returned in fp32. torch has no such
        products on a CPU: there it is widened to `dtype`, and `from_bf16` says what it was.
        """
        weight, on_cpu = self.weight, self.weight.device.type == "cpu"
        from_bf16 = on_cpu and weight.dtype == self.features.dtype == torch.bfloat16
        if on_cpu or weight.dtype not in (torch.float16, torch.bfloat16):
            weight = weight.to(dtype)
        return replace(
            self,
            features=self.features.to(weight.dtype),
            weight=weight,
            from_bf16=from_bf16,
        )


@dataclass(frozen=True)
class Family:
    """Attribute paths of one architecture's masked language model, and of its bare encoder (`has_head`)."""

    model_type: str
    """`config.model_type` of Hugging Face."""
    encoder: str
    """Name of the encoder, without pooler or head, in the masked language model: its `base_model`."""
    layers: str
    """Path of the ModuleList of layers in the masked language model, from the encoder's name on."""
    head: tuple[str, ...]
    """Prefixes of the MLM head's parameter names, tied ones aside."""
    projections: tuple[str, ...] = (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
    )
    """Paths, within a layer, of the linear maps to queries, keys and values; one path where they are one map."""
    attention_output: str = "attention.output.dense"
    """Path, within a layer, of the linear map from the heads' values back to the residual stream."""
    feed_forward: tuple[str, str] = ("intermediate.dense", "output.dense")
    """Paths, within a layer, of the linear maps to the feed-forward units and back."""
    num_layers_field: str = "num_hidden_layers"
    """Name of the layer count in the config."""
    feed_forward_field: str = "intermediate_size"
    """Name of the number of feed-forward units in the config."""
    position_projections: tuple[str, ...] = ()
    """Paths, within a layer, of further maps to queries and keys, of relative positions; in that order."""
    gated: bool = False
    """Whether the map to the feed-forward units makes as many gates beside them."""
    rotary: bool = False
    """Whether positions rotate queries and keys, so that a head's dimensions hang together."""
    attention: str = "sdpa"
    """What transformers calls the implementation of its attention: "eager" where it has no fused one."""
    projection_norm: str | None = None
    """Path, within a layer, of a norm that the queries', keys' and values' maps read through."""
    projection_calls: Callable[[Any], int] = field(default=lambda config: 1, kw_only=True)
    """How often one forward pass calls the maps to queries and keys, by config; the hidden states come first."""
    layer_output: Callable[[torch.Tensor], Any] = field(default=lambda hidden: hidden, kw_only=True)
    """What a layer returns, by its hidden states."""
    decoder: Callable[[Any], tuple[torch.Tensor, torch.Tensor | None]] = field(
        default=lambda model: (model.get_output_embeddings().weight, model.get_output_embeddings().bias),
        kw_only=True,
    )
    """Decoder weight (vocabulary, the embeddings' width), usually tied with them, and bias (vocabulary,), by model."""
    transform: Callable[[Any, torch.Tensor], torch.Tensor] = field(kw_only=True)
    """The MLM head before its decoder: features that it multiplies, (..., the embeddings' width) from (..., width)."""
    position_ids: Callable[[Any, torch.Tensor], torch.Tensor] | None = field(default=None, kw_only=True)
    """Positions by token id, where the model would take others if it is given embeddings instead of ids."""
    config_for_depth: Callable[[Any, tuple[int, ...]], dict[str, Any]] = field(
        default=lambda config, layers: {}, kw_only=True
    )
    """Config fields besides the layer count that must follow the kept layers (per-layer lists)."""

    def encode(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        inputs_embeds: torch.Tensor | None = None,
    ) -> EncoderOutput:
        """Run the encoder alone.

        Args:
            input_ids: (batch, sequence) int64.
            attention_mask: (batch, sequence), 1 where the token counts; None for all.
            inputs_embeds: (batch, sequence, width) word embeddings of `input_ids`, if looked up before.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if inputs_embeds is not None:
            inputs = {"inputs_embeds": inputs_embeds}
            if self.position_ids is not None:
                inputs["position_ids"] = self.position_ids(model, input_ids)
        output = model.base_model(
            **inputs,
            attention_mask=attention_mask,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        return EncoderOutput(output.last_hidden_state, output.hidden_states if output_hidden_states else ())

    def decoder_inputs(
        self, model: PreTrainedModel, hidden: torch.Tensor, share: float = 1.0
    ) -> DecoderInputs:
        """The decoder with its inputs for (N, width) hidden states of the last layer."""
        return DecoderInputs(self.transform(model, hidden), *self.decoder(model), share)

    def layer_list(self, model: PreTrainedModel) -> nn.ModuleList:
        return attrgetter(self.layers.removeprefix(f"{self.encoder}."))(model.base_model)

    def num_layers(self, model: PreTrainedModel) -> int:
        return int(getattr(model.config, self.num_layers_field))

    def width(self, model: PreTrainedModel) -> int:
        """Of its hidden states."""
        return int(model.config.hidden_size)


def _deberta_transform(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    if model.config.legacy:
        return model.cls.predictions.transform(hidden)
    head = model.lm_predictions.lm_head
    return head.LayerNorm(head.transform_act_fn(head.dense(hidden)))


def _deberta_decoder(model: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    if model.config.legacy:
        return model.cls.predictions.decoder.weight, model.cls.predictions.decoder.bias
    # Its get_output_embeddings is the transform's dense layer.
    return model.get_input_embeddings().weight, model.lm_predictions.lm_head.bias


def _roberta_positions(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    padding_id = model.base_model.embeddings.padding_idx
    counted = (input_ids != padding_id).long()
    return counted.cumsum(1) * counted + padding_id


BERT = Family(
    model_type="bert",
    encoder="bert",
    layers="bert.encoder.layer",
    head=("cls.predictions.",),
    transform=lambda model, hidden: model.cls.predictions.transform(hidden),
)
DISTILBERT = Family(
    model_type="distilbert",
    encoder="distilbert",
    layers="distilbert.transformer.layer",
    head=("vocab_",),
    projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    attention_output="attention.out_lin",
    feed_forward=("ffn.lin1", "ffn.lin2"),
    num_layers_field="n_layers",
    feed_forward_field="hidden_dim",
    transform=lambda model, hidden: model.vocab_layer_norm(model.activation(model.vocab_transform(hidden))),
)
ROBERTA = Family(
    model_type="roberta",
    encoder="roberta",
    layers="roberta.encoder.layer",
    head=("lm_head.",),
    transform=lambda model, hidden: model.lm_head.layer_norm(nn.functional.gelu(model.lm_head.dense(hidden))),
    position_ids=_roberta_positions,
)
XLM_ROBERTA = replace(ROBERTA, model_type="xlm-roberta")
CAMEMBERT = replace(ROBERTA, model_type="camembert")
MPNET = replace(
    ROBERTA,
    model_type="mpnet",
    encoder="mpnet",
    layers="mpnet.encoder.layer",
    projections=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    attention_output="attention.attn.o",
    attention="eager",
    layer_output=lambda hidden: (hidden,),
)
ELECTRA = Family(
    model_type="electra",
    encoder="electra",
    layers="electra.encoder.layer",
    head=("generator_predictions.", "generator_lm_head."),
    transform=lambda model, hidden: model.generator_predictions(hidden),
)
DEBERTA_V2 = Family(
    model_type="deberta-v2",
    encoder="deberta",
    layers="deberta.encoder.layer",
    head=("cls.predictions.", "lm_predictions."),
    projections=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
    position_projections=("attention.self.pos_query_proj", "attention.self.pos_key_proj"),
    attention="eager",
    # Version 3 maps the relative positions to queries and keys by the same two.
    projection_calls=lambda config: (
        2 if config.relative_attention and getattr(config, "share_att_key", False) else 1
    ),
    layer_output=lambda hidden: (hidden, None),
    transform=_deberta_transform,
    decoder=_deberta_decoder,
)
MODERNBERT = Family(
    model_type="modernbert",
    encoder="model",
    layers="model.layers",
    head=("head.", "decoder."),
    projections=("attn.Wqkv",),
    projection_norm="attn_norm",
    attention_output="attn.Wo",
    feed_forward=("mlp.Wi", "mlp.Wo"),
    gated=True,
    rotary=True,
    transform=lambda model, hidden: model.head(hidden),
    config_for_depth=lambda config, layers: {"layer_types": [config.layer_types[layer] for layer in layers]},
)

FAMILIES = {
    family.model_type: family
    for family in (
        BERT,
        DISTILBERT,
        ROBERTA,
        XLM_ROBERTA,
        CAMEMBERT,
        MPNET,
        ELECTRA,
        DEBERTA_V2,
        MODERNBERT,
    )
}

POSITIONS_AFTER_PADDING = (
    "roberta",
    "xlm-roberta",
    "camembert",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
    "longformer",
    "mpnet",
)
"""Model types whose first token takes the position behind the padding's id."""


def max_positions(config: Any) -> int | None:
    """Longest input in tokens, special ones included, that a model's config allows; None where it has no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if not positions:
        return None
    if config.model_type not in POSITIONS_AFTER_PADDING:
        return int(positions)
    padding_id = 1 if config.model_type == "mpnet" else config.pad_token_id  # MPNet's class knows no other
    return int(positions) - padding_id - 1


def has_head(model: PreTrainedModel) -> bool:
    """Whether a model predicts tokens. Without an MLM head it is the bare encoder, which is its own base model."""
    return model.base_model is not model


def bare_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """A masked language model without its head: the same tensors."""
    encoder = model.base_model
    assert isinstance(encoder, PreTrainedModel)
    return encoder


def family_of(model: PreTrainedModel) -> Family:
    """The adapter of a model, by its config's `model_type`; UserError where it is not in the table."""
    return family_of_type(model.config.model_type)


def family_of_type(model_type: str) -> Family:
    """The adapter of a `config.model_type`; UserError if the architecture is not in the table."""
    if model_type not in FAMILIES:
        raise UserError(
            f"model type {model_type!r} is not supported; known are {', '.join(FAMILIES)} "
            "(another one needs an entry in train/models/families.py)"
        )
    return FAMILIES[model_type]
