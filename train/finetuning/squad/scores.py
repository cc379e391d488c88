"""SQuAD's official scores: exact match and F1, as evaluate-v1.1.py and evaluate-v2.0.py compute them.

Both compare normalised text and take the best of a question's answers; v2.0 adds questions without an answer (right is
the empty string) and a threshold above which a system's own "no answer" score silences it. In one thing v1.1 is
followed for v2.0 too: a question without a prediction counts as 0 (evaluate-v2.0.py leaves it out of its means).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from train.errors import UserError

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)

Golds = Mapping[str, Sequence[str]]
"""Question id -> the texts of its answers; none for a question that has no answer."""


@dataclass(frozen=True)
class SquadScores:
    """Means over all questions, in points of 0 to 100."""

    metrics: dict[str, float]
    """exact_match and f1; for v2.0 also HasAns_ and NoAns_ of both, best_ of both and their thresholds."""
    total: int
    missing: tuple[str, ...]
    """Ids without a prediction: they count as 0."""
    unknown: tuple[str, ...]
    """Ids of predictions that no question has: they count for nothing."""


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces: in this order."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())


def exact_match(gold: str, prediction: str) -> float:
    """1 where both are the same after normalising, else 0."""
    return float(normalise(gold) == normalise(prediction))


def f1_v1(gold: str, prediction: str) -> float:
    """Harmonic mean of precision and recall of the words, as bags; 0 where none is common, also of two empty texts."""
    gold_words, words = normalise(gold).split(), normalise(prediction).split()
    common = sum((Counter(gold_words) & Counter(words)).values())
    return 2.0 * common / (len(gold_words) + len(words)) if common else 0.0


def f1_v2(gold: str, prediction: str) -> float:
    """As `f1_v1`; of two texts one of which has no words, 1 where neither has."""
    gold_words, words = normalise(gold).split(), normalise(prediction).split()
    return f1_v1(gold, prediction) if gold_words and words else float(gold_words == words)


def score_v1(golds: Golds, predictions: Mapping[str, str]) -> SquadScores:
    """Scores of SQuAD v1.1; UserError without questions, or where one has no answer."""
    for key, answers in golds.items():
        if not answers:
            raise UserError(f"question {key} has no answer, as in SQuAD 2.0: score it by the rules of 2.0")
    exact = _best(exact_match, golds, predictions)
    f1 = _best(f1_v1, golds, predictions)
    metrics = {"exact_match": _mean(exact, golds), "f1": _mean(f1, golds)}
    return _scores(metrics, golds, predictions)


def score_v2(
    golds: Golds,
    predictions: Mapping[str, str],
    null_scores: Mapping[str, float] | None = None,
    threshold: float | None = None,
) -> SquadScores:
    """Scores of SQuAD v2.0, all together and for the questions with (HasAns_) and without an answer (NoAns_).

    Args:
        null_scores: id -> how sure the system is that there is no answer, in any unit. With them come best_exact_match
            and best_f1, what the best threshold on this very set would give, and where it lies.
        threshold: a prediction whose null score is above it counts as "no answer"; None takes predictions as they are.
    Raises:
        UserError: no questions; predictions without a null score where there should be one for each.
    """
    # An answer of which normalising leaves nothing counts as none; the splits go by the answers as they were given.
    answered = {
        key: [answer for answer in answers if normalise(answer)] or [""] for key, answers in golds.items()
    }
    with_answer = [key for key, answers in golds.items() if answers]
    without = [key for key, answers in golds.items() if not answers]
    exact = _best(exact_match, answered, predictions)
    f1 = _best(f1_v2, answered, predictions)
    thresholded = exact, f1
    if null_scores is not None:
        lacking = [key for key in exact if key not in null_scores]
        if lacking:
            raise UserError(
                f"{len(lacking)} predictions have no null score (the first: {lacking[0]}); give one for each"
            )
        if threshold is not None:
            silent = {key for key in exact if null_scores[key] > threshold}
            thresholded = _silenced(exact, silent, golds), _silenced(f1, silent, golds)
    metrics = {}
    for prefix, keys in (("", list(golds)), ("HasAns_", with_answer), ("NoAns_", without)):
        if keys or not prefix:
            metrics[f"{prefix}exact_match"] = _mean(thresholded[0], keys)
            metrics[f"{prefix}f1"] = _mean(thresholded[1], keys)
    if null_scores is not None:
        for name, scores in (("exact_match", exact), ("f1", f1)):
            best, where = best_threshold(scores, predictions, null_scores, golds)
            metrics |= {f"best_{name}": best, f"best_{name}_threshold": where}
    return _scores(metrics, golds, predictions)


def best_threshold(
    scores: Mapping[str, float],
    predictions: Mapping[str, str],
    null_scores: Mapping[str, float],
    golds: Golds,
) -> tuple[float, float]:
    """The best mean score (0 to 100) that silencing by null score can give, and the threshold that gives it.

    From "everything is silent" on, predictions are let through in the order of their null scores.

    Args:
        scores: id -> 0 to 1, of the predictions as they are; ids without a prediction are not in it.
    """
    current = best = float(sum(not golds[key] for key in scores))
    where = 0.0
    for key in sorted(scores, key=lambda key: null_scores[key]):
        current += scores[key] if golds[key] else -float(bool(predictions[key]))
        if current > best:
            best, where = current, null_scores[key]
    return 100.0 * best / len(golds), where


def _best(
    metric: Callable[[str, str], float], golds: Golds, predictions: Mapping[str, str]
) -> dict[str, float]:
    return {
        key: max(metric(answer, predictions[key]) for answer in answers)
        for key, answers in golds.items()
        if key in predictions
    }


def _silenced(scores: Mapping[str, float], silent: set[str], golds: Golds) -> dict[str, float]:
    return {key: float(not golds[key]) if key in silent else score for key, score in scores.items()}


def _mean(scores: Mapping[str, float], keys: Sequence[str] | Golds) -> float:
    if not keys:
        raise UserError("there are no questions to score")
    return 100.0 * sum(scores.get(key, 0.0) for key in keys) / len(keys)


def _scores(metrics: dict[str, float], golds: Golds, predictions: Mapping[str, str]) -> SquadScores:
    missing = tuple(key for key in golds if key not in predictions)
    return SquadScores(metrics, len(golds), missing, tuple(key for key in predictions if key not in golds))
