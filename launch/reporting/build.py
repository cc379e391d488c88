"""Puts the report's parts in their order, and says which are missing and how to make them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.reporting.comparison import ComparedModel
from launch.reporting.inputs import (
    ABLATE,
    BENCHMARK,
    FINETUNE,
    AblationFile,
    InferenceFile,
    ModelScores,
)
from launch.reporting.page import Report, scale_sentence
from launch.reporting.runs import Curve, RunFacts
from launch.reporting.scores import downstream_table, glue_table, reference_of, retention_table
from launch.reporting.tables import Table, ablation_table, cost_table, heldout_table, size_table, speed_table

RUNS = "give the folders of finished runs (deepspeed launch/pretrain.py)"


@dataclass(frozen=True)
class Given:
    """Everything that was read; what is empty or None was not given."""

    versions: Mapping[str, str]
    runs: Sequence[RunFacts] = ()
    curves: Sequence[Curve] = ()
    compared: Sequence[ComparedModel] = ()
    scores: Sequence[ModelScores] = ()
    reference: str | None = None
    inference: InferenceFile | None = None
    ablation: AblationFile | None = None


def build(given: Given) -> Report:
    """The report of what was given.

    Raises:
        UserError: the reference is not among the scored models.
    """
    tables: list[Table | None] = [heldout_table(given.compared) if given.compared else None]
    left_out = {} if given.runs else {"Held-out scores, loss curves and cost": RUNS}
    retained = None
    if given.scores:
        reference = reference_of([model.name for model in given.scores], given.reference)
        retained = retention_table(given.scores, reference)
    glue, downstream = glue_table(given.scores), downstream_table(given.scores)
    tables += [glue, retained, downstream]
    if glue is None:
        left_out["Table 1, GLUE"] = f"{FINETUNE}, then --scores NAME=SCORES"
    if retained is None:
        left_out["Retention"] = "--scores teacher=SCORES student=SCORES, with tasks that both have"
    if downstream is None:
        left_out["Table 2, IMDb and SQuAD"] = (
            f"{FINETUNE.replace('sst2 mrpc ...', 'imdb squad')}, then --scores"
        )
    if given.inference is not None:
        tables += [size_table(given.inference), speed_table(given.inference)]
    else:
        left_out["Table 3, size and speed"] = f"{BENCHMARK}, then --inference FILE"
    if given.ablation is not None:
        tables.append(ablation_table(given.ablation))
    else:
        left_out["Table 4, ablation"] = f"{ABLATE}, then --ablation DIR/ablation.json"
    tables.append(cost_table(given.runs) if given.runs else None)
    return Report(
        scale=scale_sentence(given.runs, given.scores, given.inference),
        tables=[table for table in tables if table is not None],
        versions=given.versions,
        curves=given.curves,
        left_out=left_out,
    )
