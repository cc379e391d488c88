"""SQuAD: an answer is a span of the context. Questions in, a fine-tuned model and its scores out.

The model is what Devlin et al. 2019 (section 4.2) put on BERT: a start and an end logit for each token. A window
without the answer is taught to point at [CLS], which in SQuAD 2.0 is also what "no answer" is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForQuestionAnswering, PreTrainedModel

from data_prep.shard_format.files import write_json
from data_prep.shard_format.terminal import progress_bar
from data_prep.shard_format.tokenizer_info import tokenizer_fingerprint
from train.errors import UserError
from train.finetuning.batches import Features, Padding
from train.finetuning.data.readers import hub_name
from train.finetuning.settings import Job
from train.finetuning.soft_labels import teacher_outputs, weights_digest
from train.finetuning.squad.answers import find_answers
from train.finetuning.squad.distillation import distillation_loss, soft_spans, windows_digest
from train.finetuning.squad.features import Floats, Windows, make_windows, pair_template, question_room
from train.finetuning.squad.questions import (
    Question,
    find_squad_files,
    golds_of,
    questions_digest,
    read_questions,
)
from train.finetuning.squad.scores import score_v1, score_v2
from train.finetuning.task_runner import TaskRunner
from train.finetuning.training import TrainingSet, predict
from train.models.encoder_config import longest_input, takes_token_types
from train.models.loading import check_encoder, load_finetuned
from train.models.tokenizer_checks import load_tokenizer

NULL_THRESHOLD = 0.0  # --null_score_diff_threshold of BERT's run_squad.py


def check(job: Job) -> None:
    """UserError for data or models that are not there or do not fit, before anything is read or trained."""
    if job.unlabelled:
        raise UserError(
            f"--unlabelled has no effect on {job.task.name}, whose teachers label the training questions; leave it out"
        )
    if hub_name(job.task, job.data) is None:
        assert job.data is not None
        find_squad_files(job.task, job.data)
    _Reader(job)


def window_examples(
    windows: Windows, token_types: bool, labelled: bool = False, soft: Floats | None = None
) -> list[Features]:
    """Windows one by one, as `Padding` takes them: views of the arrays."""
    examples: list[Features] = []
    for index, (begin, end) in enumerate(pairwise(windows.bounds)):
        example: dict[str, Any] = {"input_ids": windows.input_ids[begin:end]}
        if token_types:
            types = np.full(end - begin, windows.context_type, dtype=np.int8)
            types[: windows.context_at[index]] = 0
            example["token_type_ids"] = types
        if labelled:
            example["labels"] = windows.answer[index]
        if soft is not None:
            example["soft_spans"] = soft[:, begin:end]
        examples.append(example)
    return examples


class SpanPadding(Padding):
    """`Padding`, with the labels under the names that models for question answering give them."""

    def __call__(self, examples: Sequence[Features]) -> dict[str, torch.Tensor]:
        batch = super().__call__(examples)
        if "labels" in batch:
            batch["start_positions"], batch["end_positions"] = batch.pop("labels").long().unbind(1)
        if "soft_spans" in examples[0]:
            soft = np.zeros((len(examples), 2, batch["input_ids"].shape[1]), np.float32)
            for row, example in enumerate(examples):
                soft[row, :, : len(example["input_ids"])] = example["soft_spans"]
            batch["soft_spans"] = torch.from_numpy(soft)
        return batch


class SpanRunner(TaskRunner):
    """One SQuAD task for one model."""

    def __init__(self, job: Job) -> None:
        reader = _Reader(job)
        super().__init__(job, reader.tokenizer, AutoModelForQuestionAnswering, {"num_labels": 2})
        reader.describe(job)
        train, self._questions = read_questions(job)
        self._windows = reader.windows(job, train, "training set")
        self._dev_windows = reader.windows(job, self._questions, "dev set")
        self._padding = SpanPadding(self.tokenizer.pad_token_id)
        token_types = takes_token_types(self.describe_model())
        self.train_examples = len(train)
        self.dev_examples = {"dev": len(self._questions)}
        self.metrics = job.task.metrics
        self.fingerprints = {"data": f"{questions_digest(train)} {questions_digest(self._questions)}"}
        soft, loss = None, None
        if job.teachers:
            assert job.settings.temperature is not None
            assert job.settings.hard_weight is not None
            logits = [self._teacher_logits(name) for name in job.teachers]
            soft = soft_spans(logits, self._windows, job.settings.temperature)
            loss = distillation_loss(job.settings.hard_weight, job.settings.temperature)
        examples = window_examples(self._windows, token_types, labelled=True, soft=soft)
        self.data = TrainingSet(examples, self._padding, loss)

    def dev_outputs(self, model: PreTrainedModel) -> dict[str, np.ndarray]:
        return {"dev": self._logits(model, self._dev_windows, f"{self.job.task.name} dev")}

    def score(self, outputs: Mapping[str, np.ndarray], out: Path) -> dict[str, float]:
        """Also write predictions.json, nbest_predictions.json, for SQuAD 2.0 null_odds.json."""
        assert self.job.settings.max_answer_length is not None
        longest = self.job.settings.max_answer_length
        answers = find_answers(self._questions, self._dev_windows, outputs["dev"], longest)
        golds, texts = golds_of(self._questions), answers.texts()
        if self.job.task.name == "squad":
            metrics = score_v1(golds, texts).metrics
            write_json(out / "predictions.json", texts)
        else:
            metrics = score_v2(golds, texts, answers.null_scores, NULL_THRESHOLD).metrics
            write_json(out / "predictions.json", answers.texts(NULL_THRESHOLD))
            write_json(out / "null_odds.json", answers.null_scores)
        write_json(out / "nbest_predictions.json", answers.n_best())
        return {**metrics, "score": metrics["f1"]}

    def _teacher_logits(self, name: str) -> Floats:
        """(2, tokens of all windows) of one teacher."""

        def compute() -> Floats:
            model = load_finetuned(name, AutoModelForQuestionAnswering)
            return self._logits(model, self._windows, f"{self.job.task.name} answers of {Path(name).name}")

        contents = (weights_digest(name), windows_digest(self._windows))
        shape = (2, len(self._windows.input_ids))
        return teacher_outputs(self.job.folder, name, contents, shape, compute)

    def _logits(self, model: PreTrainedModel, windows: Windows, name: str) -> Floats:
        """(2, tokens of all windows) of start and end."""
        examples = window_examples(windows, takes_token_types(model))
        start, end = predict(model, examples, self._padding, self.job, name)
        kept = np.arange(start.shape[1])[None, :] < windows.lengths[:, None]
        return np.stack([start[kept], end[kept]])


class _Reader:
    """The tokenizer, and the windows that the model and its teachers have positions for.

    Raises:
        UserError: models or tokenizers that are not there or do not go together.
    """

    def __init__(self, job: Job) -> None:
        settings = job.settings
        assert settings.doc_stride is not None
        config = check_encoder(job.model)
        self.tokenizer = load_tokenizer(job.model, config)
        template = pair_template(self.tokenizer)
        positions = [longest_input(config, self.tokenizer)]
        own = tokenizer_fingerprint(self.tokenizer)
        for name in job.teachers:
            teacher = check_encoder(name)
            tokenizer = load_tokenizer(name, teacher)
            if tokenizer_fingerprint(tokenizer) != own or pair_template(tokenizer) != template:
                raise UserError(
                    f"--teacher {name} has another tokenizer than {job.model}: an answer's place is "
                    "counted in tokens, so both must have the same; GLUE and IMDb can do without"
                )
            positions.append(longest_input(teacher, tokenizer))
        self.max_length = min(settings.max_length, *positions)
        longest_question, room = question_room(self.max_length, template)
        if longest_question < 1 or room < 1:
            raise UserError(
                f"windows of {self.max_length} tokens have no room for a question and a part of its context; give more "
                "--max-length, or a model with more positions"
            )
        self.doc_stride = min(settings.doc_stride, room)

    def describe(self, job: Job) -> None:
        """Say where windows are not as asked for, and why."""
        settings, name = job.settings, job.task.name
        if self.max_length < settings.max_length:
            job.say(
                f"{name}: windows of {self.max_length} tokens, not {settings.max_length}: there are no more positions"
            )
        if self.doc_stride != settings.doc_stride:
            job.say(
                f"{name}: windows begin every {self.doc_stride} tokens, not {settings.doc_stride}, so that none of the "
                "context is left out beside a long question"
            )

    def windows(self, job: Job, questions: Sequence[Question], what: str) -> Windows:
        """Windows over `questions`, with a progress bar; questions that had to be cut are counted aloud."""

        def watch(batches: Iterable[Any]) -> Iterable[Any]:
            name = f"{job.task.name} tokens of the {what}"
            return progress_bar(batches, desc=name, unit=" batches", leave=False, delay=1.0)

        made = make_windows(questions, self.tokenizer, self.max_length, self.doc_stride, watch)
        if made.cut_questions:
            job.say(
                f"{job.task.name}: {made.cut_questions:,} of the {what}'s {len(questions):,} questions are too long "
                "and were cut"
            )
        return made
