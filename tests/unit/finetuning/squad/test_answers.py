"""From logits to answers, by hand and against every possible span."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.unit.finetuning.squad_tokenizers import wordpiece
from train.finetuning.squad.answers import Answers, Span, best_spans, find_answers
from train.finetuning.squad.features import Windows, make_windows
from train.finetuning.squad.questions import Question

CONTEXT = "the model reads a token, the student writes"  # one token each, the comma too


def logits(windows: Windows, **peaks: float) -> np.ndarray:
    """(tokens,) zeros, but for words of the context's first appearance."""
    tokens = wordpiece().convert_ids_to_tokens(windows.input_ids.tolist())
    made = np.zeros(len(tokens), np.float32)
    for word, value in peaks.items():
        made[tokens.index(word)] = value
    return made


@pytest.fixture
def case() -> tuple[list[Question], Windows]:
    questions = [Question("q", "who?", CONTEXT, ("model",), (4,))]
    return questions, make_windows(questions, wordpiece(), 64, 10)


def test_the_best_span_and_its_text(case: tuple[list[Question], Windows]) -> None:
    questions, windows = case
    start, end = logits(windows, model=5.0, student=4.0), logits(windows, token=5.0, writes=3.0)
    answers = find_answers(questions, windows, np.stack([start, end]), 30)
    assert answers.texts() == {"q": "model reads a token"}
    assert answers.best["q"][:3] == [
        Span("model reads a token", 10.0),
        Span("model reads a token, the student writes", 8.0),
        Span("student writes", 7.0),
    ]


def test_no_span_backwards_or_too_long(case: tuple[list[Question], Windows]) -> None:
    questions, windows = case
    start, end = logits(windows, model=3.0, student=5.0), logits(windows, token=5.0, writes=4.0)
    # "student ... token" would be best, and is backwards; "model ... writes" has eight tokens.
    assert find_answers(questions, windows, np.stack([start, end]), 7).texts() == {"q": "student writes"}
    longest = find_answers(questions, windows, np.stack([start, end]), 4).best["q"]
    assert Span("model reads a token", 8.0) in longest
    assert all(len(span.text.split()) <= 4 for span in longest)


def test_nothing_outside_the_context(case: tuple[list[Question], Windows]) -> None:
    questions, windows = case
    start, end = np.zeros(len(windows.input_ids), np.float32), np.zeros(len(windows.input_ids), np.float32)
    start[: windows.context_at[0]] = end[: windows.context_at[0]] = 9.0
    end[-1] = 9.0
    start[windows.context_at[0] + 1] = 1.0
    assert find_answers(questions, windows, np.stack([start, end]), 30).texts()["q"].startswith("model")


def test_the_null_score_and_its_threshold(case: tuple[list[Question], Windows]) -> None:
    questions, windows = case
    start, end = logits(windows, model=2.0), logits(windows, model=2.0)
    start[0] = end[0] = 3.0
    answers = find_answers(questions, windows, np.stack([start, end]), 30)
    assert answers.null_scores == {"q": 2.0}
    assert answers.texts() == {"q": "model"}
    assert answers.texts(threshold=2.0) == {"q": "model"}
    assert answers.texts(threshold=1.9) == {"q": ""}


def test_windows_of_one_question_compete() -> None:
    context = " ".join(["model"] * 20 + ["batch"] + ["layer"] * 20)
    questions = [Question("q", "who?", context, (), ())]
    windows = make_windows(questions, wordpiece(), 24, 6)
    batch = wordpiece().convert_tokens_to_ids("batch")
    places = np.flatnonzero(windows.input_ids == batch)
    assert len(places) > 1
    nulls = np.arange(len(windows), 0, -1, dtype=np.float32)
    start = np.zeros(len(windows.input_ids), np.float32)
    start[places] = 5.0
    start[windows.bounds[:-1]] = nulls
    answers = find_answers(questions, windows, np.stack([start, start]), 30)
    assert answers.texts() == {"q": "batch"}
    assert answers.null_scores == {"q": 2.0 * nulls.min() - 10.0}  # the lowest of the windows
    # Only where it stands amid most context may a span begin there.
    start[places] = 0.0
    start[places[0]] = 50.0
    assert (
        find_answers(questions, windows, np.stack([start, np.zeros_like(start)]), 30).best["q"][0].score
        < 50.0
    )


def test_best_spans_are_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 19):
        start, end = rng.normal(size=(2, size)).astype(np.float32)
        may_start = rng.random(size) < 0.8
        every = [
            (float(start[i]) + float(end[j]), i, j)
            for i, j in itertools.product(range(size), repeat=2)
            if may_start[i] and 0 <= j - i < 5
        ]
        expected = sorted(every, key=lambda span: -span[0])[:20]
        found = best_spans(start, end, may_start, 5)
        assert [span[1:] for span in found] == [span[1:] for span in expected]
        assert [span[0] for span in found] == pytest.approx([span[0] for span in expected])


def test_a_span_is_found_where_all_good_ends_come_before_all_good_starts() -> None:
    start = np.r_[np.zeros(50), np.ones(50)].astype(np.float32)
    end = np.r_[np.ones(50), np.zeros(50)].astype(np.float32)
    start[70] = 2.0
    assert best_spans(start, end, np.ones(100, bool), 30) == [(2.0, 70, 70)]
    assert best_spans(start, end, np.zeros(100, bool), 30) == []


def test_a_context_without_tokens_has_no_answer() -> None:
    questions = [Question("q", "who?", "\u200b\u200b", (), ())]  # the tokenizer drops zero-width blanks
    windows = make_windows(questions, wordpiece(), 64, 10)
    assert windows.num_context.tolist() == [0]
    zeros = np.zeros(len(windows.input_ids), np.float32)
    answers = find_answers(questions, windows, np.stack([zeros, zeros]), 30)
    assert (answers.texts(), answers.texts(0.0), answers.n_best()) == ({"q": ""}, {"q": ""}, {"q": []})
    assert answers.null_scores["q"] > 1e6


def test_n_best_probabilities() -> None:
    answers = Answers({"q": [Span("a", 1000.0), Span("b", 1000.0 - np.log(3.0))]}, {"q": 0.0})
    first, second = answers.n_best()["q"]
    assert (first["probability"], second["probability"]) == pytest.approx((0.75, 0.25))
    assert first["text"] == "a"


def test_a_text_found_twice_counts_once_at_its_best(case: tuple[list[Question], Windows]) -> None:
    questions, windows = case
    start = np.zeros(len(windows.input_ids), np.float32)
    the = np.flatnonzero(windows.input_ids == wordpiece().convert_tokens_to_ids("the"))
    start[the] = 4.0, 3.0
    best = find_answers(questions, windows, np.stack([start, start]), 1).best["q"]
    assert best[0] == Span("the", 8.0)
    assert len({span.text for span in best}) == len(best)
    assert [span.score for span in best] == sorted((span.score for span in best), reverse=True)
