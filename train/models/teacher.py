"""One or several frozen encoders as a teacher, with their MLM heads where a term of the objective reads logits.

It lives outside the engine, the optimizer and every checkpoint: it is no submodule of anything that is
trained. It runs in eval mode under torch.inference_mode, fp16 on a GPU and fp32 on a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from train.errors import UserError
from train.models.attention_vectors import AttentionVectors
from train.models.families import DecoderInputs, Family, family_of, has_head, max_positions


@dataclass(frozen=True)
class TeacherMember:
    """Output of one teacher on one micro batch; all tensors are inference tensors."""

    family: Family
    model: PreTrainedModel
    share: float
    """Weight in the ensemble's average."""
    last_hidden: torch.Tensor
    """(B, L, width)."""
    hidden_states: tuple[torch.Tensor, ...]
    """Embeddings' output and every layer's, each (B, L, width); none if not asked for."""
    vectors: tuple[torch.Tensor, ...]
    """Queries, keys and values of one layer, each (B, L, width); none if not asked for."""


@dataclass(frozen=True)
class TeacherOutput:
    """Output of all teachers of an ensemble."""

    members: tuple[TeacherMember, ...]

    @torch.compiler.disable
    @torch.inference_mode()
    def decoder_inputs(self, order: torch.Tensor) -> tuple[DecoderInputs, ...]:
        """Of each member, for the tokens `order` (N,) of the flattened (B * L) tokens."""
        return tuple(
            each.family.decoder_inputs(each.model, each.last_hidden.flatten(0, 1)[order], each.share)
            for each in self.members
        )


class Teacher:
    """One or several frozen models with one vocabulary.

    Deliberately no nn.Module: nothing can register it as a part of what is trained or saved.

    Args:
        models: put into eval mode and frozen here.
        shares: weights of the ensemble's average, scaled to add up to 1; None for equal ones.
        names: of the models, for messages.
        fingerprints: of the tokenizers beside them.
        output_hidden_states: keep every layer's output, for the mapped-layer cosine.
        relation_layers: of each model, counted from 1: keep its queries, keys and values; None for no layer's.
        relations_alone: nothing else is read of it, and nothing that comes after them is computed.
        pooling: one of POOLINGS: of the first model's sentence vectors, for the objective; None where it reads none.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        shares: Sequence[float] | None = None,
        *,
        names: Sequence[str] | None = None,
        fingerprints: Sequence[str | None] | None = None,
        output_hidden_states: bool = False,
        relation_layers: Sequence[int] | None = None,
        relations_alone: bool = False,
        pooling: str | None = None,
    ) -> None:
        assert models, "train/config_sections/model.py refuses an empty list"
        self.names = tuple(names or (f"teacher {index}" for index in range(len(models))))
        self.models = tuple(model.eval().requires_grad_(False) for model in models)
        self.families = tuple(family_of(model) for model in models)
        self.shares = normalised_shares(len(models), shares)
        self.output_hidden_states = output_hidden_states
        self.pooling = pooling
        self.fingerprints = tuple(fingerprints or [None] * len(models))
        self._check_one_vocabulary()
        assert relation_layers is not None or not relations_alone
        self._vectors = self._recorded(relation_layers)
        self._relations_alone = relations_alone

    def _recorded(self, layers: Sequence[int] | None) -> list[AttentionVectors | None]:
        if layers is None:
            return [None] * len(self.models)
        for name, layer, num_layers in zip(self.names, layers, self.num_layers, strict=True):
            if layer > num_layers:
                raise UserError(
                    f"objective.relation_layers names layer {layer} of teacher {name}, which has {num_layers}"
                )
        return [
            AttentionVectors(family, model, layer)
            for family, model, layer in zip(self.families, self.models, layers, strict=True)
        ]

    def _check_one_vocabulary(self) -> None:
        first = self.names[0]
        known = self.tokenizer_fingerprint
        for name, model, fingerprint in zip(self.names, self.models, self.fingerprints, strict=True):
            if model.config.vocab_size != self.vocab_size:
                raise UserError(
                    f"the teachers' vocabularies differ: {first} has {self.vocab_size} tokens, {name} has "
                    f"{model.config.vocab_size}; an ensemble needs teachers with one tokenizer"
                )
            if fingerprint not in (None, known):
                other = self.names[self.fingerprints.index(known)]
                raise UserError(
                    f"the tokenizers of {other} and {name} differ, though both have {self.vocab_size} tokens; "
                    "an ensemble needs teachers with one tokenizer"
                )

    def check_sequence_length(self, sequence_length: int) -> None:
        """Refuse sequences that are longer than one of the teachers has positions for."""
        for name, model in zip(self.names, self.models, strict=True):
            longest = max_positions(model.config)
            if longest is not None and sequence_length > longest:
                raise UserError(
                    f"data.sequence_length={sequence_length}: teacher {name} has positions for {longest} tokens; "
                    "give that or less"
                )

    @property
    def config(self) -> Any:
        """Config of the first teacher, from which the student is made."""
        return self.models[0].config

    @property
    def has_head(self) -> bool:
        """Whether all members predict tokens."""
        return all(has_head(model) for model in self.models)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Of the first folder that ships a tokenizer; None if none does."""
        return next((value for value in self.fingerprints if value is not None), None)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the members' hidden states."""
        return tuple(family.width(model) for family, model in zip(self.families, self.models, strict=True))

    @property
    def num_layers(self) -> tuple[int, ...]:
        return tuple(
            family.num_layers(model) for family, model in zip(self.families, self.models, strict=True)
        )

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        whole: bool = False,
    ) -> TeacherOutput:
        """Hidden states of every member; logits are computed later, chunk by chunk and only where needed.

        Args:
            input_ids: (B, L) int64 on the teacher's device.
            attention_mask: (B, L), non-zero where a token counts; None when nothing is padded.
            whole: compute the last hidden states also where the objective reads relations alone, which leaves those
                of no use otherwise.
        """
        members = []
        for family, model, share, recorded in zip(
            self.families, self.models, self.shares, self._vectors, strict=True
        ):
            stops = None if whole or not self._relations_alone else recorded
            with nullcontext() if stops is None else stops.alone():
                output = family.encode(model, input_ids, attention_mask, self.output_hidden_states)
            vectors = () if recorded is None else recorded.take()
            members.append(
                TeacherMember(family, model, share, output.last_hidden, output.hidden_states, vectors)
            )
        return TeacherOutput(tuple(members))


def normalised_shares(count: int, weights: Sequence[float] | None) -> tuple[float, ...]:
    """Weights of an ensemble, scaled to add up to 1; equal ones for None."""
    if weights is None:
        return (1.0 / count,) * count
    assert len(weights) == count
    scaled = [float(weight) / max(weights) for weight in weights]
    if min(scaled) == 0:
        raise UserError(
            f"model.teacher_weights={list(weights)}: the smallest counts for nothing beside the largest"
        )
    return tuple(weight / sum(scaled) for weight in scaled)


def running_copy(
    model: PreTrainedModel, device: torch.device | str, dtype: torch.dtype | None
) -> PreTrainedModel:
    """A model in the number format it runs in; itself where that is fp32 on the CPU.

    Args:
        model: fp32, on the CPU.
        dtype: None for fp16 on a GPU and fp32 on a CPU.
    """
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.float16
    if dtype == torch.float32 and device.type == "cpu":
        return model
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():  # buffers, such as rotary frequencies, stay as they are
        parameter.data = parameter.data.to(dtype)
    copied.config.dtype = dtype
    moved: Any = copied
    return moved.to(device)  # type: ignore[no-any-return]
