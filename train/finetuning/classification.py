"""Tasks of a label for a text or a pair: GLUE, IMDb, and a user's own, where it may be several labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from train.errors import UserError
from train.finetuning import soft_labels
from train.finetuning.batches import Features, Padding, check_pairs, check_room, encode
from train.finetuning.data import readers
from train.finetuning.data.examples import Examples
from train.finetuning.metrics import metric_names, score_predictions
from train.finetuning.settings import Job
from train.finetuning.task_runner import TaskRunner
from train.finetuning.tasks import Task
from train.finetuning.training import TrainingSet, predict
from train.models.encoder_config import longest_input, takes_token_types
from train.models.loading import check_encoder, load_finetuned
from train.models.tokenizer_checks import load_tokenizer


def check(job: Job) -> None:
    """Is there a model, are its teachers', is there data? Nothing large is read; UserError for what does not fit."""
    model_and_tokenizer(job, job.model)
    if readers.hub_name(job.task, job.data) is None:
        assert job.data is not None
        readers.find_files(job.task, job.data)
    if job.unlabelled and not Path(job.unlabelled).is_file():
        raise UserError(f"--unlabelled {job.unlabelled}: there is no such file")
    for teacher in job.teachers:
        config, _ = model_and_tokenizer(job, teacher)
        soft_labels.class_order(teacher, config, job.task.labels)


class Classification(TaskRunner):
    """One such task for one model."""

    def __init__(self, job: Job) -> None:
        settings, task = job.settings, job.task
        train, dev = read_sets(job)
        if job.unlabelled:
            more = readers.read_unlabelled(task, Path(job.unlabelled), job.say)
            train = more if settings.unlabelled_only else train.joined(more)
        self.train_examples = len(train)
        self.dev_examples = {name: len(examples) for name, examples in dev.items()}
        self.metrics = metric_names(task, dev)
        self.fingerprints = fingerprints(train, dev)
        config, tokenizer = model_and_tokenizer(job, job.model)
        super().__init__(job, tokenizer, AutoModelForSequenceClassification, _head(task))
        token_types = takes_token_types(self.describe_model())
        length = clipped(job, job.model, longest_input(config, tokenizer))
        self._padding = Padding(tokenizer.pad_token_id)
        features: list[dict[str, Any]] = [*encode(tokenizer, train, length, token_types)]
        self._dev = {name: encode(tokenizer, examples, length, token_types) for name, examples in dev.items()}
        self._dev_labels = {name: examples.labels for name, examples in dev.items()}
        for example, label in zip(features, train.labels, strict=True):
            example["labels"] = label
        loss = None
        if job.teachers:
            assert settings.hard_weight is not None
            logits = [teacher_logits(job, teacher, train) for teacher in job.teachers]
            soft = soft_labels.mean_soft_labels(logits, settings.temperature, task.many)
            for example, label in zip(features, soft, strict=True):
                example["soft_labels"] = label
            loss = soft_labels.distillation_loss(settings.temperature, settings.hard_weight)
        self.data = TrainingSet(features, self._padding, loss)

    def dev_outputs(self, model: PreTrainedModel) -> dict[str, np.ndarray]:
        task = self.job.task
        return {
            name: predict(model, features, self._padding, self.job, f"{task.name} {name}")[0]
            for name, features in self._dev.items()
        }

    def score(self, outputs: Mapping[str, np.ndarray], out: Path) -> dict[str, float]:
        return score_predictions(self.job.task, outputs, self._dev_labels)


def read_sets(job: Job) -> tuple[Examples, dict[str, Examples]]:
    """(train, dev sets by name), or as much of them as the settings ask for."""
    settings = job.settings
    train, dev = readers.read_task(job.task, job.data, job.say)
    return train.sample(settings.max_train_examples), {
        name: examples.sample(settings.max_eval_examples) for name, examples in dev.items()
    }


def fingerprints(train: Examples, dev: Mapping[str, Examples]) -> dict[str, str]:
    return {"data": " ".join([train.digest(), *(examples.digest() for examples in dev.values())])}


def _head(task: Task) -> dict[str, Any]:
    """Fields of the config that describe the task's head."""
    if not task.labels:
        return {"num_labels": 1, "problem_type": "regression"}
    kind = "multi_label_classification" if task.many else "single_label_classification"
    return {**label_names(task), "problem_type": kind}


def label_names(task: Task) -> dict[str, Any]:
    """The classes, in the fields of a config."""
    labels = task.labels or ()
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def teacher_logits(job: Job, teacher: str, examples: Examples) -> np.ndarray:
    """(N, C) fp32 of one teacher, in the task's order of classes.

    The teacher reads with its own tokenizer: nothing of it has to match the student's but the labels.
    """
    config, tokenizer = model_and_tokenizer(job, teacher)
    order = soft_labels.class_order(teacher, config, job.task.labels)
    length = clipped(job, teacher, longest_input(config, tokenizer))

    def compute() -> np.ndarray:
        model = load_finetuned(teacher, AutoModelForSequenceClassification)
        features: Sequence[Features] = encode(tokenizer, examples, length, takes_token_types(model))
        name = f"{job.task.name} labels of {Path(teacher).name}"
        return predict(model, features, Padding(tokenizer.pad_token_id), job, name)[0]

    contents = (soft_labels.weights_digest(teacher), examples.digest(), str(length))
    shape = (len(examples), len(order))
    return soft_labels.teacher_outputs(job.folder, teacher, contents, shape, compute)[:, order]


def model_and_tokenizer(job: Job, name: str) -> tuple[Any, Any]:
    config = check_encoder(name)
    tokenizer = load_tokenizer(name, config)
    if job.task.is_pair:
        check_pairs(name, tokenizer)
    check_room(name, tokenizer, job.settings.max_length, job.task.is_pair)
    return config, tokenizer


def clipped(job: Job, name: str, longest: int) -> int:
    wanted = job.settings.max_length
    if wanted > longest:
        job.say(
            f"{job.task.name}: {name} has positions for {longest} tokens; texts are cut there, not at {wanted}"
        )
    return min(wanted, longest)
