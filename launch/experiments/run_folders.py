"""The run folders of an experiment: which are finished, and whether they belong to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from launch.experiments.variant import Variant
from train.config import Config
from train.data.corpus import read_corpus_digests
from train.errors import UserError
from train.run_folder import (
    WATCHING,
    as_tree,
    changed_inputs,
    differing_keys,
    final_model,
    found_before,
    read_summary,
)

FREE_TO_DIFFER = (*WATCHING, "evaluation.every_steps")
"""Between the runs of an experiment: all are scored alike."""


def is_finished(run_dir: Path) -> bool:
    """Whether the run has reached its end and left its student."""
    return read_summary(run_dir) is not None and (final_model(run_dir) / "config.json").exists()


def refuse_other_runs(out: Path, variants: Sequence[Variant], config_of: Callable[[Variant], Config]) -> None:
    """UserError naming the first variant whose folder was made with other settings, or from other shards."""
    begun = [variant for variant in variants if (out / variant.name / "config.yaml").exists()]
    if not begun:
        return
    inputs = read_corpus_digests(config_of(begun[0]).data.shards)  # no variant changes the shards
    for variant in begun:
        run_dir, config = out / variant.name, config_of(variant)
        before = yaml.safe_load((run_dir / "config.yaml").read_text())
        changes = differing_keys(before, as_tree(found_before(run_dir, config)), FREE_TO_DIFFER)
        changes += changed_inputs(run_dir, inputs)
        if changes:
            raise UserError(
                f"{run_dir} holds a run that was started with other settings:\n  "
                + "\n  ".join(changes)
                + f"\ngive those again, another --out, or remove {run_dir}"
            )


def summary_of(run_dir: Path) -> dict[str, Any]:
    """The figures of a finished run."""
    summary = read_summary(run_dir)
    assert summary is not None, "asked before the run was finished"
    return summary
