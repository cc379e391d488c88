"""Scores of predictions, by scikit-learn and scipy, in points of 0..100 (correlations: -100..100)."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from train.finetuning.tasks import Task


def score_predictions(
    task: Task, outputs: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """All of a task's metrics, and "score", their mean.

    Args:
        outputs: dev set -> (N, classes) logits, or (N, 1) numbers of a regression.
        labels: dev set -> (N,).
    Returns:
        Names as of `metric_names`. What is not defined is 0: F1 without positives, Matthews where all is one class, a
        correlation with a constant.
    """
    found = {}
    for dev, output in outputs.items():
        predicted = output.reshape(len(output)) if task.is_regression else output.argmax(axis=-1)
        for metric in task.metrics:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # both libraries warn of what is not defined
                value = METRICS[metric](labels[dev], predicted)
            found[_name(metric, dev, len(outputs))] = 100.0 * float(value)
    return {**found, "score": statistics.fmean(found.values())}


def metric_names(task: Task, dev_sets: Mapping[str, Any]) -> tuple[str, ...]:
    """The metric's own name for one dev set; accuracy_matched, accuracy_mismatched for several."""
    return tuple(_name(metric, dev, len(dev_sets)) for dev in dev_sets for metric in task.metrics)


def _name(metric: str, dev: str, num_sets: int) -> str:
    return metric if num_sets == 1 else f"{metric}_{dev}"


def _f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    return f1_score(labels, predicted, zero_division=0)


def _correlation(function: Callable[..., Any]) -> Callable[[np.ndarray, np.ndarray], float]:
    """0 where one side is constant: scipy gives NaN."""

    def correlation(labels: np.ndarray, predicted: np.ndarray) -> float:
        if len(labels) < 2:
            return 0.0
        value = float(function(labels.astype(np.float64), predicted.astype(np.float64)).statistic)
        return value if np.isfinite(value) else 0.0

    return correlation


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": _f1,
    "matthews": matthews_corrcoef,
    "pearson": _correlation(pearsonr),
    "spearman": _correlation(spearmanr),
}
