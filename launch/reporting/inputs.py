"""What launch/report.py is given beside runs: scores of fine-tuned models, an ablation, measured speeds. All checked.

A file that is cut off, of another task, or holds a NaN where a figure belongs is refused by name: nothing that is not
a figure may come to stand in a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from launch.common.figure_files import Figures, read_figures
from launch.experiments.study_results import StudyFile
from train.errors import UserError
from train.finetuning.results import FILE
from train.finetuning.tasks import TASKS, task_named

FINETUNE = "python launch/finetune.py --model MODEL --task sst2 mrpc ... --data DIR --out SCORES"


class TaskScores(Figures):
    """One scores.json of launch/finetune.py: points of 0..100."""

    task: str
    parameters: int
    median: dict[str, float]
    """By metric, and "score"."""
    spread: dict[str, tuple[float, float]]
    seeds: dict[str, Any]
    train_examples: int
    dev_examples: dict[str, int]
    """By dev set: "dev", MNLI's "matched" and "mismatched", or SPLIT_OFF."""
    settings: dict[str, Any]
    """Of the fine-tuning."""
    teacher: list[str]
    """Whose soft labels it learnt from; empty without task distillation."""
    own: dict[str, Any] = Field(default_factory=dict)
    """What a user's own task is; empty for those of the table."""


@dataclass(frozen=True)
class ModelScores:
    """All tasks of one model, as launch/finetune.py left them."""

    name: str
    parameters: int
    tasks: Mapping[str, TaskScores]


class AblatedVariant(Figures):
    """One variant of an ablation."""

    name: str
    changed: str
    heldout: dict[str, float]
    difference: dict[str, float] = Field(default_factory=dict)
    """To the full recipe, in points and nats, by held-out key and task; empty for the recipe itself."""
    glue: float | None


class AblationFile(Figures):
    """ablation.json of launch/ablate.py."""

    variants: list[AblatedVariant]
    scale: dict[str, Any] = Field(default_factory=dict)
    heldout_masking: str = "not recorded: that of the recipe"
    """Of the held-out scores."""
    noise: dict[str, float] | None = None
    """Largest difference between two seeds of the full recipe; None where there is one seed."""
    left_out: dict[str, str] = Field(default_factory=dict)
    failed: dict[str, str] = Field(default_factory=dict)


class Speed(Figures):
    """One model in one runtime on one workload."""

    workload: str = ""
    runtime: str
    device: str
    batch: int
    sequence_length: float
    latency_ms: float
    latency_ms_range: tuple[float, float] | None = None
    """Over the rounds; None where the file is of an older version."""
    sentences_per_s: float

    @property
    def kind(self) -> tuple[str, str, str, int, float]:
        """What is the same for all models of a line of the table."""
        return self.workload, self.runtime, self.device, self.batch, self.sequence_length


class ModelSpeed(Figures):
    """One model of launch/benchmark.py inference."""

    name: str
    parameters: int
    bytes: int
    source: str = ""
    rows: list[Speed]


class SpeedRatio(Figures):
    """How many times faster than the reference a model is."""

    model: str
    workload: str = ""
    runtime: str
    batch: int
    sequence_length: float
    times_faster: float
    times_faster_range: tuple[float, float] | None = None
    """Over the rounds; None where the file is of an older version."""


class InferenceFile(Figures):
    """What launch/benchmark.py inference --json wrote."""

    hardware: str
    threads: int
    models: list[ModelSpeed]
    """The reference first."""
    ratios: list[SpeedRatio]

    def ratio(self, model: str, speed: Speed) -> SpeedRatio | None:
        """To the reference at the same work; None where that was not measured."""
        wanted = (model, speed.workload, speed.runtime, speed.batch, speed.sequence_length)
        for found in self.ratios:
            if wanted == (found.model, found.workload, found.runtime, found.batch, found.sequence_length):
                return found
        return None


def named_folders(words: Sequence[str], flag: str) -> dict[str, Path]:
    """{NAME: DIR} of words NAME=DIR; UserError where two have the same name."""
    found: dict[str, Path] = {}
    for word in words:
        name, _, folder = word.partition("=")
        if not (name and folder):
            raise UserError(f"{flag} {word}: give NAME=DIR")
        if name in found:
            raise UserError(f"{flag} {word}: there is a model {name!r} already; each needs a name of its own")
        found[name] = Path(folder)
    return found


def read_model_scores(name: str, folder: Path) -> ModelScores:
    """Every DIR/TASK/scores.json.

    Raises:
        UserError: there is none, or one of them is not what its folder says; the message names the file.
    """
    if (folder / FILE).exists():
        raise UserError(
            f"--scores {name}={folder}: that is the folder of one task; give the one that holds it, "
            f"{folder.resolve().parent}"
        )
    found: dict[str, TaskScores] = {}
    for path in sorted(folder.glob(f"*/{FILE}")):
        task, scores = _read_task(path)
        if task in found:
            raise UserError(f"{folder} holds two folders of scores of {task}; move one away")
        found[task] = scores
    if not found:
        raise UserError(
            f"{folder} holds no TASK/{FILE} (--scores {name}={folder}); make them with {FINETUNE}"
        )
    parameters = max(scores.parameters for scores in found.values())
    known = [task for task in TASKS if task in found]
    return ModelScores(name, parameters, {task: found[task] for task in dict.fromkeys([*known, *found])})


def _read_task(path: Path) -> tuple[str, TaskScores]:
    scores = read_figures(path, TaskScores)
    try:
        task, folder = (
            name if scores.own else task_named(name).name for name in (scores.task, path.parent.name)
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if task != folder:
        raise UserError(f"{path}: these are scores of {task}, in a folder of {folder}; give each its own")
    if "score" not in scores.median:
        raise UserError(f'{path}: "median" holds no "score"')
    return task, scores


def read_ablation(path: Path) -> AblationFile:
    """UserError, naming the file, where it is not an ablation's."""
    ablation = read_figures(path, AblationFile)
    if not ablation.variants:
        raise UserError(f"{path}: holds no variants")
    return ablation


def read_study(path: Path) -> StudyFile:
    """UserError, naming the file, where it is not a study's."""
    study = read_figures(path, StudyFile)
    if not study.models or not study.tasks:
        raise UserError(f"{path}: holds no models or no tasks")
    return study


def read_inference(path: Path) -> InferenceFile:
    """UserError, naming the file, where it is not the benchmark's."""
    speeds = read_figures(path, InferenceFile)
    names = [model.name for model in speeds.models]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path}: its models are named {names}; each needs a name of its own")
    return speeds
