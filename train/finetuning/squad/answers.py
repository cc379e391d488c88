"""From the logits of every window to one answer per question.

As BERT's run_squad.py does it: the best spans of all windows of a question, by the sum of the start's and the end's
logit; never outside the context, never backwards, never longer than allowed, and beginning at each token only in the
window that shows it amid most context. One thing is done better: spans that cannot be are excluded before the best are
taken, not after, so that a weak model's best possible answer is not crowded out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.finetuning.squad.features import Floats, Windows, text_of, widest_context
from train.finetuning.squad.questions import Question

NUM_BEST = 20  # --n_best_size of BERT's run_squad.py


@dataclass(frozen=True)
class Span:
    """A piece of a context, and how much the model thinks of it."""

    text: str
    score: float
    """Logit of the start plus logit of the end."""


@dataclass(frozen=True)
class Answers:
    """What a model says of each question, by id."""

    best: dict[str, list[Span]]
    """At most NUM_BEST different texts, best first; empty where no span is possible."""
    null_scores: dict[str, float]
    """Score of "no answer" (the lowest of the question's windows) less that of the best span."""

    def texts(self, threshold: float | None = None) -> dict[str, str]:
        """The official format: id -> answer; "" where there is no span or the null score is above `threshold`."""
        return {
            key: spans[0].text if spans and (threshold is None or self.null_scores[key] <= threshold) else ""
            for key, spans in self.best.items()
        }

    def n_best(self) -> dict[str, list[dict[str, Any]]]:
        """For each id the best texts with their scores and probabilities among each other."""
        found = {}
        for key, spans in self.best.items():
            weights = [math.exp(span.score - spans[0].score) for span in spans]
            found[key] = [
                {"text": span.text, "probability": weight / sum(weights), "score": span.score}
                for span, weight in zip(spans, weights, strict=True)
            ]
        return found


def find_answers(
    questions: Sequence[Question], windows: Windows, logits: Floats, max_answer_length: int
) -> Answers:
    """The best spans of each question.

    Args:
        windows: of `questions`, all of them.
        logits: (2, tokens of all windows) of start and end, ragged as `windows.input_ids`.
        max_answer_length: in tokens.
    """
    start, end = logits[0], logits[1]
    candidates: list[list[tuple[float, int, int]]] = [[] for _ in questions]
    nulls = np.full(len(questions), np.inf)
    for window, shown in enumerate(widest_context(windows)):
        begin, index = int(windows.bounds[window]), int(windows.question[window])
        nulls[index] = min(nulls[index], float(start[begin]) + float(end[begin]))
        place = slice(
            begin + int(windows.context_at[window]), begin + int(windows.context_at[window]) + len(shown)
        )
        first = int(windows.first[window])
        for score, left, right in best_spans(start[place], end[place], shown, max_answer_length):
            candidates[index].append((score, first + left, first + right))
    best, null_scores = {}, {}
    for index, question in enumerate(questions):
        spans = _different(question.context, windows.offsets[index], candidates[index])
        best[question.id] = spans
        # Without any possible span, "no answer" is as sure as a number that JSON can hold says.
        null_scores[question.id] = float(nulls[index]) - spans[0].score if spans else 1e9
    return Answers(best, null_scores)


def best_spans(
    start: Floats, end: Floats, may_start: np.ndarray[Any, np.dtype[np.bool_]], max_answer_length: int
) -> list[tuple[float, int, int]]:
    """(score, first, last token) of spans over the NUM_BEST best starts and ends, at most NUM_BEST, best first.

    Args:
        start, end: (tokens of the context in a window,) logits.
        may_start: same shape.
    """
    allowed = np.flatnonzero(may_start)
    starts = allowed[np.argsort(-start[allowed], kind="stable")[:NUM_BEST]]
    ends = np.argsort(-end, kind="stable")[:NUM_BEST]
    lengths = ends[None, :] - starts[:, None] + 1  # (starts, ends)
    possible = (lengths >= 1) & (lengths <= max_answer_length)
    if not possible.any() and len(allowed):
        # All good ends lie before all good starts, or too far away: then one token, the best.
        token = int(allowed[np.argmax(start[allowed] + end[allowed])])
        return [(float(start[token]) + float(end[token]), token, token)]
    scores = np.where(
        possible, start[starts].astype(np.float64)[:, None] + end[ends][None, :], -np.inf
    ).ravel()
    order = np.argsort(-scores, kind="stable")[: min(NUM_BEST, int(possible.sum()))]
    return [(float(scores[k]), int(starts[k // len(ends)]), int(ends[k % len(ends)])) for k in order]


def _different(
    context: str, offsets: np.ndarray[Any, np.dtype[np.int32]], spans: list[tuple[float, int, int]]
) -> list[Span]:
    """The best spans with different texts, best first."""
    found: dict[str, Span] = {}
    for score, first, last in sorted(spans, key=lambda span: -span[0]):
        text = text_of(context, offsets, first, last)
        if text and text not in found:
            found[text] = Span(text, score)
            if len(found) == NUM_BEST:
                break
    return list(found.values())
