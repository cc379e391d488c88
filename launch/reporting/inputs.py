"""What launch/report.py is given beside runs: scores of fine-tuned models, an ablation, measured speeds. All checked.

A file that is cut off, of another task, or holds a NaN where a figure belongs is refused by name: nothing that is not
a figure may come to stand in a table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from train.errors import UserError
from train.finetuning.results import FILE
from train.finetuning.tasks import TASKS, task_named

Value = TypeVar("Value")
TASK_DISTILLATION_SETTINGS = ("temperature", "hard_weight", "unlabelled_only")
FINETUNE = "python launch/finetune.py --model MODEL --task sst2 mrpc ... --data DIR --out SCORES"
ABLATE = "python launch/ablate.py --config RECIPE --out DIR"
BENCHMARK = "python launch/benchmark.py inference --model teacher=DIR --model student=DIR --json FILE"


@dataclass(frozen=True)
class TaskScores:
    """One scores.json: points of 0..100."""

    task: str
    median: Mapping[str, float]
    """By metric, and "score"."""
    spread: Mapping[str, tuple[float, float]]
    num_seeds: int
    train_examples: int
    dev_examples: Mapping[str, int]
    """By dev set: "dev", MNLI's "matched" and "mismatched", or SPLIT_OFF."""
    settings: Mapping[str, Any]
    """Of the fine-tuning, without those of the task distillation."""
    teachers: Sequence[str]
    """Whose soft labels it learnt from; empty without task distillation."""


@dataclass(frozen=True)
class ModelScores:
    """All tasks of one model, as launch/finetune.py left them."""

    name: str
    parameters: int
    tasks: Mapping[str, TaskScores]


def named_folders(words: Sequence[str], flag: str) -> dict[str, Path]:
    """{NAME: DIR} of words NAME=DIR; ValueError where two have the same name."""
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
    paths = sorted(folder.glob(f"*/{FILE}"))
    if not paths:
        raise UserError(f"{folder} holds no TASK/{FILE} (--scores {name}={folder}); {FINETUNE} makes them")
    read: dict[str, tuple[TaskScores, int]] = {}
    for path in paths:
        found = _read(path, _task_scores)
        if found[0].task in read:
            raise UserError(f"{folder} holds two folders of scores of {found[0].task}; move one away")
        read[found[0].task] = found
    tasks = {task: read[task][0] for task in TASKS if task in read}
    return ModelScores(name, max(parameters for _, parameters in read.values()), tasks)


def _task_scores(scores: Any, path: Path) -> tuple[TaskScores, int]:
    task, folder = task_named(scores["task"]).name, task_named(path.parent.name).name
    if task != folder:
        raise UserError(f"{path}: these are scores of {task}, in a folder of {folder}; give each its own")
    median = {key: _number(value, f'"median" of {key}') for key, value in scores["median"].items()}
    if "score" not in median:
        raise UserError(f'{path}: "median" holds no "score"')
    spread = {
        key: (_number(low, f'"spread" of {key}'), _number(high, f'"spread" of {key}'))
        for key, (low, high) in scores["spread"].items()
    }
    found = TaskScores(
        task=task,
        median=median,
        spread=spread,
        num_seeds=len(scores["seeds"]),
        train_examples=int(scores["train_examples"]),
        dev_examples={str(key): int(value) for key, value in scores["dev_examples"].items()},
        settings={
            key: value for key, value in scores["settings"].items() if key not in TASK_DISTILLATION_SETTINGS
        },
        teachers=[str(teacher) for teacher in scores["teacher"]],
    )
    return found, int(scores["parameters"])


@dataclass(frozen=True)
class AblatedVariant:
    """One row of an ablation."""

    name: str
    changed: str
    heldout: Mapping[str, float]
    difference: Mapping[str, float]
    """To the full recipe, in points and nats, by held-out key and task; empty for the recipe itself."""
    glue: float | None


@dataclass(frozen=True)
class AblationFile:
    """ablation.json of launch/ablate.py."""

    variants: Sequence[AblatedVariant]
    scale: str
    noise: Mapping[str, float] | None
    """Largest difference between two seeds of the full recipe; None where there is one seed."""
    notes: Sequence[str]


def read_ablation(path: Path) -> AblationFile:
    """UserError, naming the file, where it is not an ablation's."""
    return _read(path, _ablation)


def _ablation(given: Any, path: Path) -> AblationFile:
    def numbers(values: Mapping[str, Any] | None) -> dict[str, float]:
        return {key: _number(value, key) for key, value in (values or {}).items()}

    variants = [
        AblatedVariant(
            str(variant["name"]),
            str(variant["changed"]),
            numbers(variant["heldout"]),
            numbers(variant.get("difference")),
            None if variant["glue"] is None else _number(variant["glue"], f'"glue" of {variant["name"]}'),
        )
        for variant in given["variants"]
    ]
    if not variants:
        raise UserError(f"{path}: holds no variants")
    scale = given.get("scale") or {}
    words = [
        f"{scale[key]:,} {text}"
        for key, text in (
            ("student_parameters", "parameters of the student"),
            ("steps", "steps"),
            ("tokens", "tokens for each variant"),
        )
        if key in scale
    ]
    told = [f"left out: {name}: {reason}" for name, reason in (given.get("left_out") or {}).items()]
    told += [f"failed: {name}: {reason}" for name, reason in (given.get("failed") or {}).items()]
    noise = given.get("noise")
    return AblationFile(variants, ", ".join(words), None if noise is None else numbers(noise), told)


@dataclass(frozen=True)
class SpeedRow:
    """One model in one runtime on one workload."""

    workload: str
    runtime: str
    device: str
    batch: int
    sequence_length: float
    latency_ms: float
    sentences_per_s: float

    @property
    def kind(self) -> tuple[str, str, str, int, float]:
        """What is the same for all models of a line of the table."""
        return self.workload, self.runtime, self.device, self.batch, self.sequence_length


@dataclass(frozen=True)
class ModelSpeed:
    """One model of launch/benchmark.py inference."""

    name: str
    parameters: int
    bytes: int
    source: str
    rows: Sequence[SpeedRow]


@dataclass(frozen=True)
class InferenceFile:
    """What launch/benchmark.py inference --json wrote."""

    hardware: str
    models: Sequence[ModelSpeed]
    """The reference first."""
    faster: Mapping[tuple[Any, ...], float]
    """(model, *kind) -> times faster than the reference."""


def read_inference(path: Path) -> InferenceFile:
    """UserError, naming the file, where it is not the benchmark's."""
    return _read(path, _inference)


def _inference(given: Any, path: Path) -> InferenceFile:
    models = [
        ModelSpeed(
            str(model["name"]),
            int(model["parameters"]),
            int(model["bytes"]),
            str(model.get("source", "")),
            [
                SpeedRow(
                    str(row.get("workload", "")),
                    str(row["runtime"]),
                    str(row["device"]),
                    int(row["batch"]),
                    _number(row["sequence_length"], '"sequence_length"'),
                    _number(row["latency_ms"], f'"latency_ms" of {model["name"]}'),
                    _number(row["sentences_per_s"], f'"sentences_per_s" of {model["name"]}'),
                )
                for row in model["rows"]
            ],
        )
        for model in given["models"]
    ]
    names = [model.name for model in models]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path}: its models are named {names}; each needs a name of its own")
    device = {row.runtime: row.device for row in models[0].rows}
    faster = {
        (
            ratio["model"],
            ratio.get("workload", ""),
            ratio["runtime"],
            device.get(ratio["runtime"], ""),
            ratio["batch"],
            float(ratio["sequence_length"]),
        ): _number(ratio["times_faster"], '"times_faster"')
        for ratio in given["ratios"]
    }
    threads = f"{given['threads']} thread{'' if given['threads'] == 1 else 's'}"
    return InferenceFile(f"{given['hardware']}, {threads}", models, faster)


def _read(path: Path, parse: Callable[[Any, Path], Value]) -> Value:
    """A parsed JSON file; whatever is wrong with it becomes one ValueError that names the file."""
    try:
        return parse(json.loads(path.read_text()), path)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except KeyError as error:
        raise UserError(f"{path}: lacks {error}; make it again with this version") from None
    except (TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: is not such a file ({error}); make it again") from None
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise UserError(f"{path}: {error}") from None


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where} is {value!r}, no number; score or measure it again")
    return float(value)
