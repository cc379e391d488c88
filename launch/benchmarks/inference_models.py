"""What launch/benchmarks/inference.py measures: models, the work they are given, the ways to run them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
)

from launch.export import read_texts
from launch.reporting.inputs import named_folders
from train.errors import UserError
from train.export.onnx_check import open_session, run_session
from train.export.onnx_export import quantise, trace
from train.models.build import count_parameters
from train.models.encoder_config import read_tokenizer
from train.models.heads import head_of, input_names, longest_sequence
from train.models.loading import load_with_saved_head

# Tokens of STS-B's 1,500 dev pairs in BERT's uncased vocabulary: 20 equally frequent lengths (mean 31.4; of all 31.5).
STSB_LENGTHS = (15, 16, 17, 18, 19, 21, 21, 23, 24, 26, 29, 32, 34, 37, 39, 42, 45, 49, 55, 65)
MAX_TEXTS = 100
SINGLE_BATCHES = 5
"""Batches of one sequence are quick: so many are timed together."""
Inputs = dict[str, torch.Tensor]


@dataclass
class Contender:
    """One model, ready to run in several ways."""

    name: str
    source: str
    model: PreTrainedModel
    head: str
    """What stands on the encoder, in words."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of the file, by runtime."""
    runs: dict[str, Callable[[Inputs], Any]] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return count_parameters(self.model)


@dataclass(frozen=True)
class Workload:
    """Batches that are passed through one after another; a round times them together."""

    name: str
    batch: int
    sequence_length: float
    """Tokens, the mean where they differ."""
    batches: Mapping[str, Sequence[Inputs]]
    """By model, since each may have a tokenizer of its own."""


def load_contenders(words: Sequence[str]) -> list[Contender]:
    """The models of `NAME=DIR`, or the published shapes with random weights; the reference first."""
    if not words:
        torch.manual_seed(0)
        source, head = "random weights", "one output"
        bert = BertForSequenceClassification(_one_output(BertConfig())).eval()
        distilbert = DistilBertForSequenceClassification(_one_output(DistilBertConfig())).eval()
        return [
            Contender("BERT-base", source, bert, head),
            Contender("DistilBERT-base", source, distilbert, head),
        ]
    return [
        Contender(name, str(folder), *as_classifier(load_with_saved_head(folder)))
        for name, folder in named_folders(words, "--model").items()
    ]


def as_classifier(model: PreTrainedModel) -> tuple[PreTrainedModel, str]:
    """The model with a classifier's head in place of a masked-language-modelling one, and what the head is."""
    task = head_of(model).task
    if task != "fill-mask":
        return model, task
    classifier = (
        AutoModelForSequenceClassification.from_config(_one_output(model.config), trust_remote_code=False)
        .float()
        .eval()
    )
    classifier.base_model.load_state_dict(model.base_model.state_dict(), strict=False)  # it may have a pooler
    return classifier, "one output in place of the vocabulary's"


def _one_output(config: Any) -> Any:
    config.num_labels = 1
    return config


def make_workloads(
    contenders: Sequence[Contender], batch_sizes: Sequence[int], lengths: Sequence[int], texts: Path | None
) -> list[Workload]:
    """Batch 1 over lengths as in the paper or over texts, then every batch size with every length."""
    room = min(_positions(contender) for contender in contenders)
    if max(lengths) > room:
        short = next(contender.name for contender in contenders if _positions(contender) == room)
        raise UserError(
            f"--lengths {max(lengths)}: {short} has positions for {room} tokens; give that or less"
        )
    if texts is not None:
        batches = {each.name: texts_of(texts, each) for each in contenders}
        tokens = [one["input_ids"].shape[1] for one in batches[contenders[0].name]]
        found = [Workload(f"{len(tokens)} texts", 1, sum(tokens) / len(tokens), batches)]
    else:
        found = [_random_workload("STS-B", contenders, [(1, min(length, room)) for length in STSB_LENGTHS])]
    for length in lengths:
        for batch in batch_sizes:
            count = SINGLE_BATCHES if batch == 1 else 1
            found.append(_random_workload("", contenders, [(batch, length)] * count))
    return found


def _positions(contender: Contender) -> int:
    """The longest input of a model, in tokens."""
    return longest_sequence(contender.model, at_most=None)


def _random_workload(
    name: str, contenders: Sequence[Contender], shapes: Sequence[tuple[int, int]]
) -> Workload:
    mean = sum(length for _, length in shapes) / len(shapes)
    batches = {each.name: random_batches(each, shapes) for each in contenders}
    return Workload(name, shapes[0][0], mean, batches)


def random_batches(contender: Contender, shapes: Sequence[tuple[int, int]]) -> list[Inputs]:
    """Random tokens without padding, int64 of each (batch, tokens)."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = contender.model.config.vocab_size
    made = []
    for shape in shapes:
        ids = torch.randint(min(10, vocabulary - 1), vocabulary, shape, generator=generator)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
        }
        made.append({name: inputs[name] for name in input_names(contender.model)})
    return made


def texts_of(path: Path, contender: Contender) -> list[Inputs]:
    """At most `MAX_TEXTS` lines of the file, evenly spread, through the model's own tokenizer, one by one."""
    lines = read_texts(path)
    if not Path(contender.source).is_dir():
        raise UserError("--texts: needs models with tokenizers; give --model NAME=DIR")
    tokenizer = read_tokenizer(contender.source)
    made = []
    for line in lines[:: -(-len(lines) // MAX_TEXTS)]:
        encoded = tokenizer(
            *line.split("\t")[:2], truncation=True, max_length=_positions(contender), return_tensors="pt"
        )
        given = {"token_type_ids": torch.zeros_like(encoded["input_ids"]), **encoded}
        made.append({name: given[name] for name in input_names(contender.model)})
    return made


def prepare(contender: Contender, runtimes: Sequence[str], device: str, folder: Path) -> None:
    """Fill in the ways to run a model, and what it takes on disk."""
    number = len(list(folder.iterdir()))
    weights = folder / f"{number}.safetensors"
    save_model(contender.model, str(weights))
    contender.sizes["eager"] = weights.stat().st_size
    for runtime in runtimes:
        if runtime.startswith("onnx"):
            path = folder / f"{number}.{runtime}.onnx"
            if runtime == "onnx":
                trace(contender.model, path)
            else:
                quantise(contender.model, path)
            contender.sizes[runtime] = path.stat().st_size
            contender.runs[runtime] = _in_onnx_runtime(path)
    model: Any = contender.model
    model = model.to(device, torch.float16) if device == "cuda" else model
    if "eager" in runtimes:
        contender.runs["eager"] = _in_torch(model)
    if "compile" in runtimes:
        contender.runs["compile"] = _in_torch(torch.compile(model, dynamic=True))
    contender.runs = {runtime: contender.runs[runtime] for runtime in runtimes}


def _in_onnx_runtime(path: Path) -> Callable[[Inputs], Any]:
    session = open_session(path)
    return lambda inputs: run_session(session, inputs)


def _in_torch(model: Callable[..., Any]) -> Callable[[Inputs], Any]:
    def run(inputs: Inputs) -> Any:
        with torch.inference_mode():
            return model(**inputs)

    return run


def numbers(flag: str, words: str) -> list[int]:
    """Positive integers with commas between."""
    try:
        found = [int(word) for word in words.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise UserError(f"{flag} {words}: give positive numbers with commas between")
    return list(dict.fromkeys(found))
