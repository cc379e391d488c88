"""What the finished runs of an ablation score, all under the same masking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.shard_format.files import read_json, write_json
from launch.ablation.table import METRICS, Result, Scale
from launch.ablation.variants import FULL
from launch.experiments.run_folders import summary_of
from launch.experiments.variant import Variant
from train.build import heldout_scoring
from train.config import Config
from train.distributed.device import kind_here
from train.evaluation.masking import LABEL, evaluation_label, label_of_row
from train.finetuning.results import read_scores
from train.models.build import teacher_config, teacher_names
from train.models.loading import load_masked_lm
from train.run_folder import final_model, found_before, recorded_config

AS_FULL = "heldout_as_full.json"


def teacher_layers(config: Config) -> int:
    """Layers of the teacher that the student is made from; 0 without a teacher."""
    names = teacher_names(config)
    return int(teacher_config(names[0]).num_hidden_layers) if names else 0


def refuse_teachers_without_head(config: Config) -> None:
    """UserError where a teacher predicts no tokens, of which all the table's held-out scores are."""
    for name in [] if config.objective.needs_masks else teacher_names(config):  # else every run refuses it
        load_masked_lm(
            name, no_head_remedy="the table's scores are of predicted tokens: give a teacher with its head"
        )


def scale_of(run_dir: Path) -> Scale:
    """How large a finished run was."""
    summary = summary_of(run_dir)
    parameters = summary["parameters"]
    return Scale(
        student_parameters=parameters["student"],
        teacher_parameters=parameters["teacher"],
        steps=summary["steps"],
        tokens=summary["tokens"],
    )


def teacher_scores(run_dir: Path, masking: str) -> dict[str, float]:
    """The teacher's own held-out scores, as the run has measured them at its start; empty where it has not, or under
    another masking."""
    before, config = summary_of(run_dir)["heldout_before"], recorded_config(run_dir)
    if label_of_row(before, config) != masking:
        return {}
    return {key: before[f"teacher_{key}"] for key in METRICS if f"teacher_{key}" in before}


def results_of(out: Path, variants: Sequence[Variant], full: Config, tasks: Sequence[str]) -> list[Result]:
    """What finished variants score on the held-out windows, all under the same masking.

    A run's own last evaluation serves where it was taken under that masking and with a teacher at hand. The others are
    scored anew, which takes a while; what they score is kept in their folders.
    """
    masking = evaluation_label(full.data.sequence_length)
    heldout = {variant.name: _measured(out / variant.name, masking) for variant in variants}
    missing = [name for name, scores in heldout.items() if len(scores) < len(METRICS)]
    if missing:
        score = scorer(found_before(out / FULL, full))
        for name in missing:
            heldout[name] = score(final_model(out / name))
            write_json(out / name / AS_FULL, {**heldout[name], LABEL: masking})
    return [_result(out / variant.name, variant, heldout[variant.name], tasks) for variant in variants]


def scorer(config: Config) -> Callable[[Path], dict[str, float]]:
    """What scores students' folders on a recipe's held-out windows, against its teacher.

    Raises:
        UserError: the shards hold no held-out windows.
    """
    device = kind_here()
    _, evaluation, teacher = heldout_scoring(config, device)

    def score(student: Path) -> dict[str, float]:
        model: Any = load_masked_lm(str(student)).eval()
        model.to(device)
        scores = evaluation(model, teacher)
        return {key: scores[key] for key in METRICS}

    return score


def _measured(run_dir: Path, masking: str) -> dict[str, float]:
    """Held-out scores under a masking, of the run itself or scored afterwards; empty where neither is there."""
    afterwards, config = run_dir / AS_FULL, recorded_config(run_dir)
    found = [summary_of(run_dir)["heldout"]]
    found += [read_json(afterwards, "remove it")] if afterwards.exists() else []
    for heldout in found:
        if set(METRICS) <= set(heldout) and label_of_row(heldout, config) == masking:
            return {key: heldout[key] for key in METRICS}
    return {}


def _result(run_dir: Path, variant: Variant, heldout: dict[str, float], tasks: Sequence[str]) -> Result:
    scores = {task: read_scores(run_dir / "scores" / task) for task in tasks}
    return Result(
        name=variant.name,
        changed=variant.changed,
        heldout=heldout,
        tokens_per_s=summary_of(run_dir)["tokens_per_s"],
        scores={task: found["median"]["score"] for task, found in scores.items() if found is not None},
    )
