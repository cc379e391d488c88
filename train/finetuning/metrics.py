"""Scores of predictions, by scikit-learn, scipy and seqeval, in points of 0..100 (correlations: -100..100)."""

from __future__ import annotations

import itertools
import statistics
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import f1_score as entity_f1_score
from seqeval.metrics import precision_score, recall_score
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from train.finetuning.tasks import Task


def score_predictions(
    task: Task, outputs: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """All of a task's metrics, and "score", their mean.

    Args:
        outputs: dev set -> (N, classes) logits, or (N, 1) numbers of a regression.
        labels: dev set -> (N,), or (N, classes) zeros and ones where a text may have several.
    Returns:
        Names as of `metric_names`. What is not defined is 0: F1 without positives, Matthews where all is one class, a
        correlation with a constant.
    """
    found = {}
    for dev, output in outputs.items():
        if task.many:
            predicted = (output > 0).astype(np.float32)  # more likely than not
        else:
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


def score_tags(
    task: Task, tags: Mapping[str, list[list[str]]], predicted: Mapping[str, list[list[str]]]
) -> dict[str, float]:
    """As `score_predictions`, of tags for words: entities by seqeval, with their precision and recall.

    Args:
        tags, predicted: dev set -> for each text the names of its words' tags.
    """
    found: dict[str, float] = {}
    for dev, golds in tags.items():
        values: dict[str, float] = {}
        words = [list(itertools.chain.from_iterable(each)) for each in (golds, predicted[dev])]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for metric in task.metrics:
                if metric == "entity_f1":
                    for name, function in ENTITY_METRICS.items():
                        values[name] = function(golds, predicted[dev], zero_division=0)
                else:
                    values[metric] = METRICS[metric](*map(np.array, words))
        found |= {_name(metric, dev, len(tags)): 100.0 * float(value) for metric, value in values.items()}
    names = metric_names(task, tags)
    return {**found, "score": statistics.fmean(found[name] for name in names)}


def _correlation(function: Callable[..., Any]) -> Callable[[np.ndarray, np.ndarray], float]:
    """0 where one side is constant: scipy gives NaN."""

    def correlation(labels: np.ndarray, predicted: np.ndarray) -> float:
        if len(labels) < 2:
            return 0.0
        value = float(function(labels.astype(np.float64), predicted.astype(np.float64)).statistic)
        return value if np.isfinite(value) else 0.0

    return correlation


ENTITY_METRICS: dict[str, Callable[..., float]] = {
    "entity_precision": precision_score,
    "entity_recall": recall_score,
    "entity_f1": entity_f1_score,
}
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "f1": partial(f1_score, zero_division=0),
    # Over the classes that occur: among labels of several at a time, over all.
    "macro_f1": partial(f1_score, average="macro", zero_division=0),
    "micro_f1": partial(f1_score, average="micro", zero_division=0),
    "matthews": matthews_corrcoef,
    "pearson": _correlation(pearsonr),
    "spearman": _correlation(spearmanr),
}
