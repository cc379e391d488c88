"""Tasks of a label for each word of a text: named entities, parts of speech.

A word's label is predicted at its first token, as BERT's authors do (Devlin et al. 2019, arXiv:1810.04805, section
5.3). Words go to the tokenizer joined by spaces, as they come in a text when the model is used. A word of which the
model sees nothing, beyond the longest input, is counted as the commonest label of the training set, which is O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForTokenClassification, PreTrainedModel

from train.errors import UserError
from train.finetuning import classification, soft_labels
from train.finetuning.batches import ENCODED_TOGETHER, Features, Padding
from train.finetuning.classification import clipped, fingerprints, label_names, model_and_tokenizer, read_sets
from train.finetuning.data.examples import NO_LABEL, Examples
from train.finetuning.metrics import metric_names, score_tags
from train.finetuning.settings import Job
from train.finetuning.task_runner import TaskRunner
from train.finetuning.training import TrainingSet, predict
from train.models.encoder_config import longest_input, takes_token_types
from train.models.loading import load_finetuned


def check(job: Job) -> None:
    """As train/finetuning/classification.py's; UserError also where texts without labels are given."""
    if job.unlabelled:
        raise UserError(
            f"--unlabelled has no effect on {job.task.name}, whose words have labels; leave it out"
        )
    classification.check(job)


def encode_words(
    tokenizer: Any, texts: Sequence[Sequence[str]], max_length: int, token_types: bool
) -> list[dict[str, np.ndarray]]:
    """Tokens, and where words begin among them.

    Returns:
        For each text "input_ids", with `token_types` "token_type_ids", (length,) int32; "words" and "places", (n,)
        int64: which words have tokens within the length, ascending, and the place of the first token of each.
    """
    encoded: list[dict[str, np.ndarray]] = []
    for start in range(0, len(texts), ENCODED_TOGETHER):
        part = texts[start : start + ENCODED_TOGETHER]
        chunk = tokenizer(
            [" ".join(words) for words in part],
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=token_types,
            return_offsets_mapping=True,
        )
        for index, words in enumerate(part):
            lengths = np.array([len(word) for word in words])
            starts = np.cumsum(lengths + 1) - lengths - 1
            spans = np.array(chunk["offset_mapping"][index]).reshape(-1, 2)
            # By a token's last character: its first may be the space before the word.
            owners = np.searchsorted(starts, spans[:, 1] - 1, side="right") - 1
            inside = (spans[:, 1] > spans[:, 0]) & (spans[:, 1] <= starts[owners] + lengths[owners])
            found, first = np.unique(owners[inside], return_index=True)
            example = {"input_ids": np.asarray(chunk["input_ids"][index], dtype=np.int32)}
            if token_types:
                example["token_type_ids"] = np.asarray(chunk["token_type_ids"][index], dtype=np.int32)
            encoded.append({**example, "words": found, "places": np.flatnonzero(inside)[first]})
    return encoded


class TagPadding(Padding):
    """Collates `encode_words`: "labels" (B, S), NO_LABEL where no word begins; "soft_labels", a row for each word."""

    def __call__(self, examples: Sequence[Features]) -> dict[str, torch.Tensor]:
        given = ("input_ids", "token_type_ids")
        batch = super().__call__([{name: each[name] for name in given if name in each} for each in examples])
        if "labels" in examples[0]:
            labels = np.full(batch["input_ids"].shape, NO_LABEL, dtype=np.int64)
            for row, example in enumerate(examples):
                labels[row, example["places"]] = example["labels"]
            batch["labels"] = torch.from_numpy(labels)
        if "soft_labels" in examples[0]:
            batch["soft_labels"] = torch.from_numpy(
                np.concatenate([example["soft_labels"] for example in examples])
            )
        return batch


class Tagging(TaskRunner):
    """One such task for one model."""

    def __init__(self, job: Job) -> None:
        train, dev = read_sets(job)
        self.train_examples = len(train)
        self.dev_examples = {name: len(examples) for name, examples in dev.items()}
        self.metrics = metric_names(job.task, dev)
        self.fingerprints = fingerprints(train, dev)
        config, tokenizer = model_and_tokenizer(job, job.model)
        super().__init__(job, tokenizer, AutoModelForTokenClassification, label_names(job.task))
        self._padding = TagPadding(tokenizer.pad_token_id)
        token_types = takes_token_types(self.describe_model())
        length = clipped(job, job.model, longest_input(config, tokenizer))

        def encode(name: str, examples: Examples) -> list[dict[str, np.ndarray]]:
            made = encode_words(tokenizer, examples.first, length, token_types)
            unseen = sum(map(len, examples.first)) - sum(len(example["words"]) for example in made)
            if unseen:
                job.say(
                    f"{job.task.name}: {unseen:,} words of the {name} set are beyond {length} tokens, or have none"
                )
            return made

        features = encode("training", train)
        self._dev, self._dev_sets = {name: encode(name, examples) for name, examples in dev.items()}, dev
        self._commonest = int(np.bincount(np.concatenate(list(train.labels))).argmax())
        loss = self._teach(features, train) if job.teachers else None
        for example, labels in zip(features, train.labels, strict=True):
            example["labels"] = labels[example["words"]]
        # Of an example without words the mean loss is no number.
        seen = [example for example in features if len(example["words"])]
        if not seen:
            raise UserError(f"{job.task.name}: the model sees none of the words of the training set")
        self.data = TrainingSet(seen, self._padding, loss)

    def _teach(self, features: list[dict[str, np.ndarray]], train: Examples) -> Any:
        """Put the teachers' labels into the features, and leave the words that all of them see; the loss."""
        settings = self.job.settings
        assert settings.hard_weight is not None
        said = [_teacher_logits(self.job, teacher, train) for teacher in self.job.teachers]
        for index, example in enumerate(features):
            kept = example["words"]
            for words, _ in said:
                kept = np.intersect1d(kept, words[index], assume_unique=True)
            example["places"] = example["places"][np.isin(example["words"], kept)]
            example["words"] = kept
            logits = [rows[index][np.isin(words[index], kept)] for words, rows in said]
            example["soft_labels"] = soft_labels.mean_soft_labels(logits, settings.temperature)
        return soft_labels.distillation_loss(settings.temperature, settings.hard_weight)

    def dev_outputs(self, model: PreTrainedModel) -> dict[str, np.ndarray]:
        """(words seen, C) logits for each dev set."""
        return {
            name: _word_logits(model, features, self._padding, self.job, f"{self.job.task.name} {name}")
            for name, features in self._dev.items()
        }

    def score(self, outputs: Mapping[str, np.ndarray], out: Path) -> dict[str, float]:
        names = self.job.task.labels
        assert names is not None
        golds: dict[str, list[list[str]]] = {}
        predicted: dict[str, list[list[str]]] = {}
        for dev, examples in self._dev_sets.items():
            found = np.split(outputs[dev].argmax(axis=-1), _ends(self._dev[dev]))
            golds[dev] = [[names[label] for label in labels] for labels in examples.labels]
            predicted[dev] = []
            for example, classes, labels in zip(self._dev[dev], found, examples.labels, strict=True):
                whole = np.full(len(labels), self._commonest)
                whole[example["words"]] = classes
                predicted[dev].append([names[label] for label in whole])
        return score_tags(self.job.task, golds, predicted)


def _ends(features: Sequence[Features]) -> np.ndarray:
    """Where the words of each text but the last end, among those of all."""
    return np.cumsum([len(example["words"]) for example in features])[:-1]


def _word_logits(
    model: PreTrainedModel, features: Sequence[Features], padding: Padding, job: Job, name: str
) -> np.ndarray:
    """(words, C) fp32 at the first tokens of all words, text by text."""
    logits = predict(model, features, padding, job, name)[0]
    return np.concatenate([row[example["places"]] for row, example in zip(logits, features, strict=True)])


def _teacher_logits(job: Job, teacher: str, examples: Examples) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each text the words that the teacher sees, and its logits for them, (n, C) in the task's order of classes."""
    config, tokenizer = model_and_tokenizer(job, teacher)
    order = soft_labels.class_order(teacher, config, job.task.labels)
    length = clipped(job, teacher, longest_input(config, tokenizer))
    model = load_finetuned(teacher, AutoModelForTokenClassification)
    features = encode_words(tokenizer, examples.first, length, takes_token_types(model))
    words = [example["words"] for example in features]

    def compute() -> np.ndarray:
        name = f"{job.task.name} labels of {Path(teacher).name}"
        return _word_logits(model, features, TagPadding(tokenizer.pad_token_id), job, name)

    contents = (soft_labels.weights_digest(teacher), examples.digest(), str(length))
    shape = (sum(map(len, words)), len(order))
    logits = soft_labels.teacher_outputs(job.folder, teacher, contents, shape, compute)[:, order]
    return words, np.split(logits, _ends(features))
