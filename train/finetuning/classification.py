"""Tasks of one label for a text or a pair: GLUE and IMDb."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification

from train.errors import NonFiniteError, UserError
from train.finetuning import hub, readers, soft_labels
from train.finetuning.batches import Features, Padding
from train.finetuning.examples import Examples
from train.finetuning.metrics import metric_names, score_predictions
from train.finetuning.settings import Job
from train.finetuning.task_models import (
    check_encoder,
    load_finetuned,
    load_tokenizer,
    load_with_new_head,
    longest_input,
    weights_digest,
)
from train.finetuning.tokenization import check_pairs, check_room, encode
from train.finetuning.training import fit, predict
from train.models.build import count_parameters
from train.models.encoder_config import takes_token_types


def check(job: Job) -> None:
    """Is there a model, are its teachers', is there data? Nothing large is read.

    Raises:
        UserError, FileNotFoundError: what is missing or does not fit.
    """
    _model_and_tokenizer(job, job.model)
    if hub.hub_name(job.task, job.data) is None:
        assert job.data is not None
        readers.find_files(job.task, job.data)
    if job.unlabelled and not Path(job.unlabelled).is_file():
        raise FileNotFoundError(f"--unlabelled {job.unlabelled}: there is no such file")
    for teacher in job.teachers:
        config, _ = _model_and_tokenizer(job, teacher)
        soft_labels.class_order(teacher, config, job.task.labels)


def prepare(job: Job) -> Classification:
    """Read, encode, and ask the teachers: once for all seeds."""
    return Classification(job)


class Classification:
    """One task for one model, as train/finetuning/runs.py runs it."""

    def __init__(self, job: Job) -> None:
        self._job = job
        settings, task = job.settings, job.task
        train, dev = _read(job)
        train = train.sample(settings.max_train_examples)
        dev = {name: examples.sample(settings.max_eval_examples) for name, examples in dev.items()}
        if job.unlabelled:
            more = readers.read_unlabelled(task, Path(job.unlabelled), job.say)
            train = more if settings.unlabelled_only else train.joined(more)
        self.train_examples = len(train)
        self.dev_examples = {name: len(examples) for name, examples in dev.items()}
        self.metrics = metric_names(task, dev)
        digests = [train.digest(), *(examples.digest() for examples in dev.values())]
        self.fingerprints = {"data": " ".join(digests)}
        config, self._tokenizer = _model_and_tokenizer(job, job.model)
        model = self._new_model(0)
        self.parameters = count_parameters(model)
        length = _clipped(job, job.model, longest_input(config, self._tokenizer))
        token_types = takes_token_types(model)
        self._padding = Padding(self._tokenizer.pad_token_id)
        self._train: list[dict[str, Any]] = [*encode(self._tokenizer, train, length, token_types)]
        self._dev = {
            name: encode(self._tokenizer, examples, length, token_types) for name, examples in dev.items()
        }
        self._dev_labels = {name: examples.labels for name, examples in dev.items()}
        for features, label in zip(self._train, train.labels, strict=True):
            features["labels"] = label
        self._loss: soft_labels.SoftLabelLoss | None = None
        if job.teachers:
            self._add_soft_labels(train)

    def _add_soft_labels(self, train: Examples) -> None:
        job = self._job
        assert job.settings.hard_weight is not None
        logits = []
        for teacher in job.teachers:
            logits.append(teacher_logits(job, teacher, train))
        for features, label in zip(
            self._train, soft_labels.mean_soft_labels(logits, job.settings.temperature), strict=True
        ):
            features["soft_labels"] = label
        self._loss = soft_labels.SoftLabelLoss(job.settings.temperature, job.settings.hard_weight)

    def _new_model(self, seed: int) -> Any:
        task = self._job.task
        head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
        if task.labels:
            head = {
                "id2label": dict(enumerate(task.labels)),
                "label2id": {label: index for index, label in enumerate(task.labels)},
                "problem_type": "single_label_classification",
            }
        return load_with_new_head(self._job.model, AutoModelForSequenceClassification, seed, head)

    def run_seed(self, seed: int, work: Path, out: Path) -> dict[str, float]:
        """Train, save the model, score it: points of 0..100, and what the training took."""
        job = self._job
        started = time.monotonic()
        model = self._new_model(seed)
        fitted = fit(model, self._train, self._padding, job, seed, work, self._loss)
        model.eval()
        outputs = {
            name: predict(model, features, self._padding, job, f"{job.task.name} {name}")[0]
            for name, features in self._dev.items()
        }
        if not all(np.isfinite(output).all() for output in outputs.values()):
            raise NonFiniteError(
                f"{job.task.name} seed {seed}: the model's outputs are no numbers any more; give a lower "
                f"--learning-rate than {job.settings.learning_rate:g}"
            )
        model.save_pretrained(out)
        self._tokenizer.save_pretrained(out)
        return {
            **score_predictions(job.task, outputs, self._dev_labels),
            "seconds": time.monotonic() - started,
            "examples_per_s": fitted.examples_per_s,
        }


def teacher_logits(job: Job, teacher: str, examples: Examples) -> np.ndarray:
    """(N, C) fp32 of one teacher, in the task's order of classes; kept in OUT/TASK/soft-labels/ and read from there.

    The teacher reads with its own tokenizer: nothing of it has to match the student's but the labels.
    """
    config, tokenizer = _model_and_tokenizer(job, teacher)
    order = soft_labels.class_order(teacher, config, job.task.labels)
    length = _clipped(job, teacher, longest_input(config, tokenizer))
    path = soft_labels.cached_logits(job.folder, weights_digest(teacher), examples.digest(), str(length))
    logits = soft_labels.read_logits(path, (len(examples), len(order)))
    if logits is None:
        model = load_finetuned(teacher, AutoModelForSequenceClassification)
        features: list[Features] = [*encode(tokenizer, examples, length, takes_token_types(model))]
        name = f"{job.task.name} labels of {Path(teacher).name}"
        logits = predict(model, features, Padding(tokenizer.pad_token_id), job, name)[0]
        if not np.isfinite(logits).all():
            raise UserError(f"teacher {teacher}: its outputs are no numbers; give another")
        soft_labels.write_logits(path, logits)
    return logits[:, order]


def _read(job: Job) -> tuple[Examples, dict[str, Examples]]:
    named = hub.hub_name(job.task, job.data)
    if named is not None:
        return hub.read_hub(job.task, *named)
    assert job.data is not None
    return readers.read_examples(job.task, readers.find_files(job.task, job.data), job.say)


def _model_and_tokenizer(job: Job, name: str) -> tuple[Any, Any]:
    config = check_encoder(name)
    tokenizer = load_tokenizer(name, config)
    if job.task.is_pair:
        check_pairs(name, tokenizer)
    check_room(name, tokenizer, job.settings.max_length, job.task.is_pair)
    return config, tokenizer


def _clipped(job: Job, name: str, longest: int) -> int:
    wanted = job.settings.max_length
    if wanted > longest:
        job.say(
            f"{job.task.name}: {name} has positions for {longest} tokens; texts are cut there, not at {wanted}"
        )
    return min(wanted, longest)
