"""The stages of launch/ablate.py: every variant trained, every student fine-tuned, the results compared."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from data_prep.shard_format.files import write_json, write_text
from launch.ablation.figure import plot
from launch.ablation.runs import results_of, scale_of, teacher_scores
from launch.ablation.table import Ablation, as_json, as_markdown, as_text
from launch.ablation.variants import FULL
from launch.common.tables import text_table
from launch.experiments.job import Job, reason_of
from launch.experiments.run_folders import is_finished
from launch.experiments.variant import Variant
from train.config import Config
from train.errors import BAD_USAGE
from train.evaluation.masking import evaluation_label
from train.run_folder import final_model, provenance


@dataclass(frozen=True)
class AblationPlan:
    """What is to be compared."""

    base: Config
    variants: list[Variant]
    left_out: dict[str, str]


def listed(plan: AblationPlan) -> str:
    """What would be trained, and what is left out."""
    rows = [(variant.name, variant.changed.replace(" ", "\n"), variant.title) for variant in plan.variants]
    lines = [text_table(("variant", "changes", "what it is"), rows, right=False)]
    return "\n".join([*lines, *(f"left out: {name}: {reason}" for name, reason in plan.left_out.items())])


def run(job: Job, plan: AblationPlan) -> int:
    """Train, fine-tune, compare; the exit code.

    Raises:
        StoppedError: a signal came.
    """
    job.train(plan.variants)
    if FULL in job.failed:
        print("without the full recipe there is nothing to compare with", file=sys.stderr)
        return BAD_USAGE if job.failed[FULL] == reason_of(BAD_USAGE) else 1
    if job.finetuning:
        compare(job, plan)  # what is known is worth keeping before the hours of fine-tuning
        trained = [variant.name for variant in plan.variants if variant.name not in job.failed]
        job.finetune({name: str(final_model(job.out / name)) for name in trained})
    print("\n" + compare(job, plan))
    print(f"\nfigure:  {job.out / 'ablation.png'}\ntable:   {job.out / 'ablation.md'}")
    print(f"figures: {job.out / 'ablation.json'}", flush=True)
    for name, reason in job.failed.items():
        print(f"FAILED: {name} ({reason})", file=sys.stderr)
    return 1 if job.failed else 0


def compare(job: Job, plan: AblationPlan) -> str:
    """Write ablation.json, .md and .png of what is finished; the table for the screen."""
    finished = [variant for variant in plan.variants if is_finished(job.out / variant.name)]
    masking = evaluation_label(plan.base.data.sequence_length)
    ablation = Ablation(
        results=results_of(job.out, finished, plan.base, list(job.finetuning)),
        scale=scale_of(job.out / FULL),
        masking=masking,
        teacher=teacher_scores(job.out / FULL, masking),
        finetuning_seeds=job.finetuning_seeds if job.finetuning else 0,
        failed=job.failed,
        left_out=plan.left_out,
    )
    write_json(job.out / "ablation.json", {**as_json(ablation), "versions": provenance()})
    write_text(job.out / "ablation.md", as_markdown(ablation))
    plot(ablation, job.out / "ablation.png")
    return as_text(ablation)
