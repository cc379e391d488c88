"""OUT/TASK/scores.json: what an encoder scores on a task, for every seed, with median and spread.

All scores are in points of 0..100. "score" is the task's one number in tables: the mean of its metrics, which is how
GLUE (Wang et al. 2019, arXiv:1804.07461, section 5) makes one number of a task with several.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.shard_format.files import read_json, write_json
from train.errors import UserError
from train.finetuning.tasks import GLUE
from train.run_folder import provenance

FILE = "scores.json"
NOT_SCORES = ("seconds", "examples_per_s")
"""Of a seed, beside its scores: they have no median in scores.json."""


def write_scores(folder: Path, scores: Mapping[str, Any], seeds: Mapping[int, Mapping[str, float]]) -> dict:
    """Write folder/scores.json, atomically.

    Args:
        scores: everything but "seeds", "median", "spread" and "versions".
        seeds: seed -> its metrics, "score" among them.
    Returns:
        What was written.
    """
    median, spread = median_and_spread(seeds)
    by_seed = {str(seed): dict(seeds[seed]) for seed in sorted(seeds)}
    whole = {**scores, "seeds": by_seed, "median": median, "spread": spread, "versions": provenance()}
    write_json(folder / FILE, whole)
    return whole


def read_scores(folder: Path) -> dict[str, Any] | None:
    """What `write_scores` left in a task's folder, None where nothing is; UserError where the file is no such file."""
    path = folder / FILE
    try:
        scores = read_json(path, "")
        is_whole = "task" in scores and all(map(_has_score, (scores["median"], *scores["seeds"].values())))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"{path} is no file of scores; delete it and run launch/finetune.py again")
    return scores


def read_seed_scores(folder: Path) -> dict[str, float]:
    """The scores of a finished seed, from its model folder; UserError where the file is no such file."""
    path = folder / FILE
    try:
        scores = read_json(path, "")
        is_whole = _has_score(scores)
    except (ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise UserError(
            f"{path} is no file of a seed's scores; delete {folder} and run launch/finetune.py again"
        )
    return scores


def _has_score(scores: Mapping[str, float]) -> bool:
    return math.isfinite(scores["score"])


def median_and_spread(
    seeds: Mapping[int, Mapping[str, float]],
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Median, and [lowest, highest], of every metric over the seeds."""
    names = [name for name in next(iter(seeds.values()), {}) if name not in NOT_SCORES]
    values = {name: [seed[name] for seed in seeds.values()] for name in names}
    median = {name: statistics.median(value) for name, value in values.items()}
    return median, {name: [min(value), max(value)] for name, value in values.items()}


def macro_average(scores: Mapping[str, float]) -> float | None:
    """Mean of the GLUE tasks among `scores` (task -> score), None without any; say how many of the nine there were."""
    found = [scores[name] for name in GLUE if name in scores]
    return statistics.fmean(found) if found else None
