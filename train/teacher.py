"""Load masked language models, and run one or several of them as a frozen teacher.

The teacher lives outside the engine, the optimizer and every checkpoint: it is no submodule of anything that
is trained. It runs in eval mode under torch.inference_mode, fp16 on a GPU and fp32 on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

from data_prep.shard_format import TokenizerInfo, tokenizer_fingerprint
from train.chunk_terms import DecoderRows
from train.families import Family, family_of, family_of_type

logger = logging.getLogger(__name__)

SPECIAL_IDS = (
    "pad_token_id",
    "cls_token_id",
    "sep_token_id",
    "bos_token_id",
    "eos_token_id",
    "mask_token_id",
)


def load_masked_lm(path_or_hub: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A masked language model from a Hugging Face folder or the hub, every weight from the checkpoint.

    transformers only warns when weights are missing and leaves them random; a teacher with a random head
    would teach noise, so that is an error here.

    Raises:
        ValueError: the architecture is not supported, or weights are missing or of the wrong shape.
        OSError: nothing to load there (from transformers).
    """
    config = AutoConfig.from_pretrained(path_or_hub)
    family = family_of_type(config.model_type)
    try:
        model, info = AutoModelForMaskedLM.from_pretrained(
            path_or_hub, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
    except RuntimeError as error:  # shapes that differ from the config's
        raise ValueError(
            f"{path_or_hub}: its weights do not fit its config.json: {_first_line(error)}"
        ) from error
    missing = sorted(info["missing_keys"])
    head = [name for name in missing if name.startswith(family.head)]
    if head:
        raise ValueError(
            f"{path_or_hub} has no MLM head: {_listed(head)} missing from its weights (its config.json names "
            f"{', '.join(config.architectures or ['no architecture'])}); give a checkpoint that was saved with "
            "its masked-language-model head"
        )
    if missing:
        raise ValueError(
            f"{path_or_hub} is incomplete: {_listed(missing)} missing from its weights; give a whole checkpoint"
        )
    return model


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{shown}{rest} {'is' if len(names) == 1 else 'are'}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@dataclass(frozen=True)
class TeacherMember:
    """Output of one teacher on one micro batch; all tensors are inference tensors."""

    family: Family
    model: PreTrainedModel
    share: float
    last_hidden: torch.Tensor
    """(B, L, width)."""
    hidden_states: tuple[torch.Tensor, ...] | None

    def hidden_state(self, index: int) -> torch.Tensor:
        """(B, L, width): 0 the embeddings' output, i the output of layer i."""
        if self.hidden_states is None:
            raise ValueError(
                "the teacher was run without hidden states; load it with output_hidden_states=True"
            )
        return self.hidden_states[index]

    @torch.inference_mode()
    def rows(self, order: torch.Tensor) -> DecoderRows:
        """Decoder inputs for the tokens `order` (N,) of the flattened (B * L) tokens."""
        features = self.family.transform(self.model, self.last_hidden.flatten(0, 1)[order])
        weight, bias = self.family.decoder(self.model)
        return DecoderRows(features, weight, bias, self.share)


@dataclass(frozen=True)
class TeacherOutput:
    """Output of all teachers of an ensemble."""

    members: tuple[TeacherMember, ...]

    def rows(self, order: torch.Tensor) -> tuple[DecoderRows, ...]:
        return tuple(member.rows(order) for member in self.members)


@dataclass(frozen=True)
class PrecisionReport:
    """How far a teacher in its running precision is from itself in fp32, on one batch."""

    name: str
    dtype: str
    kl: float
    """Mean KL(fp32 || running precision) at T = 1, nats per token."""
    top1_agreement: float
    largest_logit: float


class Teacher:
    """One or several frozen masked language models with the same vocabulary.

    Deliberately no nn.Module: nothing can register it as a part of what is trained or saved.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        shares: Sequence[float] | None = None,
        *,
        names: Sequence[str] | None = None,
        fingerprints: Sequence[str | None] | None = None,
        output_hidden_states: bool = False,
        compile: bool = False,
    ) -> None:
        self.names = tuple(names or (f"teacher {index}" for index in range(len(models))))
        self.models = tuple(model.eval().requires_grad_(False) for model in models)
        self.families = tuple(family_of(model) for model in models)
        self.shares = normalised_shares(len(models), shares)
        self.output_hidden_states = output_hidden_states
        self._fingerprints = tuple(fingerprints or [None] * len(models))
        self._check_one_vocabulary()
        self._encoders = tuple(
            torch.compile(family.encode) if compile else family.encode for family in self.families
        )

    def _check_one_vocabulary(self) -> None:
        first = self.models[0].config
        for name, model, fingerprint in zip(self.names, self.models, self._fingerprints, strict=True):
            if model.config.vocab_size != first.vocab_size:
                raise ValueError(
                    f"the teachers' vocabularies differ: {self.names[0]} has {first.vocab_size} entries, {name} "
                    f"has {model.config.vocab_size}; an ensemble needs teachers with one tokenizer"
                )
            if None not in (fingerprint, self._fingerprints[0]) and fingerprint != self._fingerprints[0]:
                raise ValueError(
                    f"the tokenizers of {self.names[0]} and {name} differ, though both have "
                    f"{first.vocab_size} entries; an ensemble needs teachers with one tokenizer"
                )

    @property
    def config(self) -> Any:
        """Config of the first teacher, from which the student is made."""
        return self.models[0].config

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.models[0].dtype

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Of the first folder that ships a tokenizer; None if none does."""
        return next((value for value in self._fingerprints if value is not None), None)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(family.width(model) for family, model in zip(self.families, self.models, strict=True))

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> TeacherOutput:
        """Hidden states of every member; logits are computed later, where and chunk by chunk as needed.

        Args:
            input_ids: (B, L) int64 on the teacher's device.
            attention_mask: (B, L), non-zero where a token counts; None when nothing is padded.
        """
        members = []
        with torch.inference_mode():
            for family, model, share, encode in zip(
                self.families, self.models, self.shares, self._encoders, strict=True
            ):
                output = encode(model, input_ids, attention_mask, self.output_hidden_states)
                members.append(TeacherMember(family, model, share, output.last_hidden, output.hidden_states))
        return TeacherOutput(tuple(members))


def normalised_shares(count: int, weights: Sequence[float] | None) -> tuple[float, ...]:
    """Weights of an ensemble, scaled to add up to 1; equal ones if None."""
    if weights is None:
        return (1.0 / count,) * count
    if len(weights) != count:
        raise ValueError(f"{len(weights)} teacher weights for {count} teachers; give one weight each")
    if any(not 0 < weight < float("inf") for weight in weights):
        raise ValueError(
            f"teacher weights are {list(weights)}; give numbers above 0 (or leave that teacher out)"
        )
    return tuple(float(weight) / sum(weights) for weight in weights)


def load_teacher(
    paths: str | Sequence[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    compile: bool = False,
    weights: Sequence[float] | None = None,
    *,
    output_hidden_states: bool = False,
) -> Teacher:
    """Load one or several teachers, frozen, onto a device.

    Args:
        paths: Hugging Face folders or hub names.
        dtype: None for fp16 on a GPU and fp32 on a CPU.
        compile: run the encoders through torch.compile.
        weights: of the ensemble's members; scaled to add up to 1.
        output_hidden_states: keep every layer's output, for the mapped-layer cosine.
    Raises:
        ValueError: no MLM head, unsupported architecture, vocabularies that differ, bad weights.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    if not paths:
        raise ValueError("model.teacher is an empty list; name at least one teacher, or leave it out")
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.float16
    normalised_shares(len(paths), weights)
    models = [load_masked_lm(path, dtype).to(device) for path in paths]
    return Teacher(
        models,
        weights,
        names=paths,
        fingerprints=[folder_fingerprint(path) for path in paths],
        output_hidden_states=output_hidden_states,
        compile=compile,
    )


def folder_fingerprint(path_or_hub: str) -> str | None:
    """Fingerprint of the tokenizer beside a model; None if there is none, or none to compare."""
    if Path(path_or_hub).is_dir() and not any(Path(path_or_hub).glob("*token*")):
        return None
    try:
        return tokenizer_fingerprint(AutoTokenizer.from_pretrained(path_or_hub))
    except (OSError, ValueError) as error:
        logger.warning("%s: its tokenizer cannot be compared with the shards': %s", path_or_hub, error)
        return None


def check_vocabulary(name: str, config: Any, fingerprint: str | None, tokenizer: TokenizerInfo) -> None:
    """Refuse a model whose token ids do not mean what the shards' mean.

    Args:
        name: of the model, for the message.
        config: its Hugging Face config.
        fingerprint: of the tokenizer beside it, or None.
        tokenizer: the manifest's record.
    """
    if fingerprint is not None and fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{name} was made with another tokenizer than the shards (fingerprint {fingerprint[:12]}, shards "
            f"{tokenizer.fingerprint[:12]}); write the shards with --tokenizer {name}"
        )
    # Some models pad their embedding beyond the tokenizer; that is harmless where the tokenizers are equal.
    padded = fingerprint is not None and config.vocab_size > tokenizer.vocab_size
    if config.vocab_size != tokenizer.vocab_size and not padded:
        raise ValueError(
            f"{name} has a vocabulary of {config.vocab_size}, the shards' tokenizer of {tokenizer.vocab_size}; "
            f"write the shards with --tokenizer {name}"
        )
    if fingerprint is not None:
        return
    same = {
        "pad": tokenizer.pad_id,
        "cls": tokenizer.cls_id,
        "sep": tokenizer.sep_id,
        "mask": tokenizer.mask_id,
    }
    for special, expected in same.items():
        own = getattr(config, f"{special}_token_id", None)
        if own is not None and own != expected:
            raise ValueError(
                f"{name} has {special}_token_id {own}, the shards' tokenizer {expected}; write the shards with "
                f"the tokenizer of {name}"
            )
