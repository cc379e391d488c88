"""Runs side by side: one teacher, its students and their controls, on the same held-out windows."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from data_prep.shard_format.manifest import Manifest, without_scheme
from data_prep.shard_format.remote import is_remote
from train.build import heldout_scoring
from train.config import Config
from train.errors import UserError
from train.evaluation.importance import importance
from train.evaluation.masking import LABEL
from train.models.build import (
    TeacherFolder,
    build_student,
    check_sequence_length,
    count_parameters,
    teacher_names,
)
from train.models.loading import load_encoder
from train.models.tokenizer_checks import check_vocabulary
from train.run_folder import final_model, read_summary


@dataclass(frozen=True)
class ComparedModel:
    """A model's scores and speed; None for a score that was not taken, as of a model without an MLM head."""

    name: str
    parameters: int
    mlm_loss: float | None
    """Held-out, nats per masked token."""
    accuracy: float | None
    """Share of held-out masked tokens guessed right."""
    top1_agreement: float | None
    """Share of held-out masked tokens at which the teacher prefers the same token."""
    kl: float | None
    """KL(teacher || model) at T = 1, nats per masked token."""
    sentences_per_s: float
    """Of the encoder, on the CPU, batches of 32."""
    masking: str | None
    """That the scores of masked tokens were taken under, in words; the same for all that are compared."""
    relation: float | None = None
    """Held-out divergence from the teacher's relations, nats, as the run has measured it."""
    cosine: float | None = None
    """Held-out 1 - cos of the last hidden states and the teacher's, as the run has measured it."""
    embedding: float | None = None
    """The same of the pooled vectors."""

    @property
    def perplexity(self) -> float | None:
        return None if self.mlm_loss is None else math.exp(min(self.mlm_loss, 700.0))


def compare(run_dirs: Sequence[Path], configs: Sequence[Config]) -> list[ComparedModel]:
    """Score the teacher of the first run, and every run's model before and after training.

    Args:
        run_dirs, configs: finished runs over the same shards; the first has a teacher.
    Raises:
        UserError: a run is not finished, the first has no teacher, or the shards have no held-out windows.
    """
    config = configs[0]
    if not teacher_names(config):
        raise UserError(f"{run_dirs[0]} has no teacher to compare with: name a distilled run first")
    shards = config.data.shards
    folder = Path(without_scheme(shards))
    if not (is_remote(shards) or folder.is_absolute() or folder.exists()):
        raise UserError(
            f"{run_dirs[0]}/config.yaml names data.shards={shards!r}, which is not here: it counts from the folder "
            "that the run was started in; type this command there"
        )
    manifest, evaluation, teacher = heldout_scoring(config, "cpu")
    models: dict[str, PreTrainedModel] = {"teacher": teacher.models[0]}
    measured: dict[str, dict[str, Any]] = {}
    for run_dir, run_config in zip(run_dirs, configs, strict=True):
        if run_dir.name == "teacher":
            raise UserError(f"{run_dir}: a row named teacher is the first run's teacher; rename the folder")
        folder = final_model(run_dir)
        if not folder.is_dir():
            raise UserError(f"{run_dir} is not finished: it holds no {folder.name}/ yet")
        refuse_other_tokenizer(folder, manifest)
        if teacher_names(run_config) and run_config.model.layer_map != "random":
            before = f"{run_dir.name} before training"
            models[before] = build_student(
                run_config, manifest, measured=functools.partial(importance, run_config, manifest, "cpu")
            ).eval()
            measured[before] = (read_summary(run_dir) or {}).get("heldout_before") or {}
        models[run_dir.name] = load_encoder(str(folder)).eval()
        measured[run_dir.name] = (read_summary(run_dir) or {}).get("heldout") or {}
    for model in models.values():
        check_sequence_length(model, config.data.sequence_length)
    speeds = sentences_per_second(list(models.values()), config.data.sequence_length)
    compared = []
    for (name, model), speed in zip(models.items(), speeds, strict=True):
        print(f"scoring {name}", flush=True)
        scores = {**measured.get(name, {}), **evaluation(model, teacher)}
        kl = scores.get("heldout_kl")
        compared.append(
            ComparedModel(
                name=name,
                parameters=count_parameters(model),
                mlm_loss=scores.get("heldout_mlm_loss"),
                accuracy=scores.get("heldout_accuracy"),
                top1_agreement=scores.get("heldout_top1_agreement"),
                kl=None if kl is None else max(0.0, kl),
                sentences_per_s=speed,
                masking=scores.get(LABEL),
                relation=scores.get("heldout_relation"),
                cosine=scores.get("heldout_cos"),
                embedding=scores.get("heldout_embedding"),
            )
        )
    return compared


def refuse_other_tokenizer(folder: Path, manifest: Manifest) -> None:
    """UserError where a run's model reads other token ids than those of the windows that all models are scored on."""
    found = TeacherFolder(str(folder), needs_head=False)
    try:
        check_vocabulary(str(folder), found.config, found.fingerprint, manifest.tokenizer)
    except UserError:
        raise UserError(
            f"{folder} has another tokenizer than the first run's shards, on whose held-out windows all models are "
            "scored: report it apart"
        ) from None


@torch.inference_mode()
def sentences_per_second(
    models: Sequence[PreTrainedModel], sequence_length: int, batch_size: int = 32, rounds: int = 7
) -> list[float]:
    """Sentences of `sequence_length` tokens per second through each encoder, on the CPU.

    The models take turns, so that a noisy machine disturbs them alike; the median over the rounds counts.
    """
    vocabulary = min(int(model.config.vocab_size) for model in models)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, vocabulary, (batch_size, sequence_length), generator=generator)
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + 1):
        for model, spent in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model.base_model(input_ids)
            spent.append(time.perf_counter() - start)
    return [batch_size / statistics.median(spent[1:]) for spent in seconds]


def as_json(compared: Sequence[ComparedModel]) -> list[dict[str, Any]]:
    """As summary.json holds them."""
    return [{**vars(model), "perplexity": model.perplexity} for model in compared]
