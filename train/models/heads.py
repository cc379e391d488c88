"""The heads that encoders are exported and measured with: what a model reads, what it returns, inputs to try it on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from train.errors import UserError
from train.models.encoder_config import read_tokenizer, takes_token_types
from train.models.families import max_positions

# Names of dynamic axes, as in Hugging Face's optimum.
BATCH, SEQUENCE = "batch_size", "sequence_length"
LONGEST_CHECKED = 512


@dataclass(frozen=True)
class Head:
    """What a model's class makes of the last layer."""

    task: str
    """The pipeline's name."""
    auto_class: str
    outputs: Mapping[str, tuple[str, ...]]
    """Output name -> names of its dynamic axes."""


HEADS = {
    "ForMaskedLM": Head("fill-mask", "AutoModelForMaskedLM", {"logits": (BATCH, SEQUENCE)}),
    "ForSequenceClassification": Head(
        "text-classification", "AutoModelForSequenceClassification", {"logits": (BATCH,)}
    ),
    "ForQuestionAnswering": Head(
        "question-answering",
        "AutoModelForQuestionAnswering",
        {"start_logits": (BATCH, SEQUENCE), "end_logits": (BATCH, SEQUENCE)},
    ),
    "ForTokenClassification": Head(
        "token-classification", "AutoModelForTokenClassification", {"logits": (BATCH, SEQUENCE)}
    ),
    "Model": Head("feature-extraction", "AutoModel", {"last_hidden_state": (BATCH, SEQUENCE)}),
}


def head_of(model: PreTrainedModel) -> Head:
    """The entry of `HEADS` for a model, by its class's name; UserError where there is none."""
    return head_of_class(type(model).__name__, type(model).__name__)


def head_of_class(class_name: str, where: str) -> Head:
    """The entry of `HEADS` for the name of a model's class; `where` begins the message if there is none."""
    for suffix, head in HEADS.items():
        # BertLMHeadModel is no BertModel: its head would be lost.
        if class_name.endswith(suffix) and not class_name.endswith("LMHeadModel"):
            return head
    raise UserError(f"{where}: {class_name} is not among the heads known here: {', '.join(HEADS)}")


def input_names(model: PreTrainedModel) -> tuple[str, ...]:
    """What the model reads: token types only where it distinguishes them."""
    return ("input_ids", "attention_mask", *(("token_type_ids",) if takes_token_types(model) else ()))


def longest_sequence(model: PreTrainedModel, at_most: int | None = LONGEST_CHECKED) -> int:
    """Tokens that the position table (or the config) allows, `at_most` unless that is None."""
    positions = max_positions(model.config) or LONGEST_CHECKED
    return positions if at_most is None else min(at_most, positions)


def random_inputs(model: PreTrainedModel, batch: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """Random tokens, int64 (batch, length); every second sequence is half padding, and has two token types."""
    generator = torch.Generator().manual_seed(seed)
    pad = model.config.pad_token_id or 0
    ids = torch.randint(0, model.config.vocab_size - 1, (batch, length), generator=generator)
    ids += (ids >= pad).long()  # any but the padding
    mask = torch.ones_like(ids)
    if length > 1:
        mask[1::2, (length + 1) // 2 :] = 0
    ids[mask == 0] = pad
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in input_names(model):
        inputs["token_type_ids"] = (torch.arange(length) >= length // 2).long().expand(batch, -1).clone()
    return inputs


def text_inputs(
    model: PreTrainedModel, folder: Path, texts: Sequence[str], batch: int
) -> list[dict[str, torch.Tensor]]:
    """Batches of real sentences, through the tokenizer of the model's folder, shortened to fit."""
    tokenizer = read_tokenizer(folder)
    batches = []
    for start in range(0, len(texts), batch):
        encoded = tokenizer(
            list(texts[start : start + batch]),
            padding=True,
            truncation=True,
            max_length=longest_sequence(model),
            return_tensors="pt",
        )
        given = {"token_type_ids": torch.zeros_like(encoded["input_ids"]), **encoded}
        batches.append({name: given[name] for name in input_names(model)})
    return batches
