"""One task made ready for all seeds: what GLUE, IMDb and SQuAD have in common."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from train.errors import NonFiniteError
from train.finetuning.settings import Job
from train.finetuning.training import TrainingSet, fit
from train.models.build import count_parameters
from train.models.encoder_config import write_length_limit
from train.models.loading import load_with_new_head


class TaskRunner(ABC):
    """Reads and encodes the data and asks the teachers when it is made, once; then trains seed by seed."""

    train_examples: int
    dev_examples: dict[str, int]
    metrics: tuple[str, ...]
    """Names of the task's metrics, in the order of tables, without "score"."""
    parameters: int
    fingerprints: dict[str, str]
    """Digests of the data: an OUT begun with other contents is refused."""
    data: TrainingSet

    def __init__(self, job: Job, tokenizer: Any, auto_class: Any, head: Mapping[str, Any]) -> None:
        self.job, self.tokenizer, self._auto_class, self._head = job, tokenizer, auto_class, head

    def new_model(self, seed: int) -> PreTrainedModel:
        return load_with_new_head(self.job.model, self._auto_class, seed, self._head)

    def describe_model(self) -> PreTrainedModel:
        """Count the parameters of a new model, and return it."""
        model = self.new_model(0)
        self.parameters = count_parameters(model)
        return model

    def run_seed(self, seed: int, work: Path, out: Path) -> dict[str, float]:
        """Train in `work` (checkpoints, which survive a kill), write the model folder `out`.

        Returns:
            Metrics and "score" in points of 0..100, "seconds" and "examples_per_s".
        Raises:
            train.finetuning.training.Stopped: `job.stop` asked for it; a checkpoint was left.
            NonFiniteError: the weights or outputs are no numbers any more.
        """
        job, started = self.job, time.monotonic()
        model = self.new_model(seed)
        seconds_before, examples_per_s = fit(model, self.data, job, seed, work)
        model.eval()
        outputs = self.dev_outputs(model)
        if not all(np.isfinite(output).all() for output in outputs.values()):
            raise NonFiniteError(
                f"{job.task.name} seed {seed}: the model's outputs are no numbers any more; give a lower "
                f"--learning-rate than {job.settings.learning_rate:g}"
            )
        model.save_pretrained(out)
        self.tokenizer.save_pretrained(out)
        write_length_limit(out, model.config)
        return {
            **self.score(outputs, out),
            "seconds": seconds_before + time.monotonic() - started,
            "examples_per_s": examples_per_s * self.train_examples / len(self.data.examples),
        }

    @abstractmethod
    def dev_outputs(self, model: PreTrainedModel) -> dict[str, np.ndarray]:
        """The model's outputs for each dev set, by its name."""

    @abstractmethod
    def score(self, outputs: Mapping[str, np.ndarray], out: Path) -> dict[str, float]:
        """Metrics and "score" of `dev_outputs`; what else the task leaves goes into `out`."""
