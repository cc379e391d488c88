"""Windows against the stock tokenizer's own, and the way from characters to tokens and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.unit.finetuning.squad_tokenizers import byte_pairs, wordpiece
from train.errors import UserError
from train.finetuning.squad.features import (
    PairTemplate,
    Windows,
    answer_tokens,
    make_windows,
    pair_template,
    text_of,
    widest_context,
    window_parts,
)
from train.finetuning.squad.questions import Question


def asked(context: str, answer: str | None, question: str = "what reads?", key: str = "q") -> Question:
    if answer is None:
        return Question(key, question, context, (), ())
    return Question(key, question, context, (answer,), (context.index(answer),))


def rows(windows: Windows) -> list[list[int]]:
    return [part.tolist() for part in np.split(windows.input_ids, windows.bounds[1:-1])]


def test_parts_of_a_context() -> None:
    assert window_parts(5, 10, 4) == [(0, 5)]
    assert window_parts(10, 10, 4) == [(0, 10)]
    assert window_parts(11, 10, 4) == [(0, 10), (4, 7)]
    assert window_parts(20, 10, 10) == [(0, 10), (10, 10)]
    assert window_parts(0, 10, 4) == [(0, 0)]


def test_templates() -> None:
    assert pair_template(wordpiece()) == PairTemplate((2,), (3,), (3,), 1)
    assert pair_template(byte_pairs()) == PairTemplate((0,), (2, 2), (2,), 0)


def test_tokenizers_that_do_not_serve() -> None:
    with pytest.raises(UserError, match=r"gives a pair of texts as \['a', 'a'\], without \[CLS\] first"):
        pair_template(wordpiece(with_pairs=False))
    with pytest.raises(UserError, match=r"without \[CLS\] first"):
        pair_template(wordpiece(cls_token="[MASK]"))
    with pytest.raises(UserError, match="found by the offsets of a fast tokenizer"):
        pair_template(object())


@pytest.mark.parametrize("made", [wordpiece, byte_pairs])
@pytest.mark.parametrize(("max_length", "doc_stride"), [(64, 20), (40, 10), (24, 1)])
def test_windows_are_the_stock_tokenizers(
    made: Any, max_length: int, doc_stride: int, documents: list[str]
) -> None:
    tokenizer = made()
    context, question = f"The {' '.join(documents[:4])[:500]}, Café 👩‍🔬 x.", "fast?"
    windows = make_windows([asked(context, None, question)], tokenizer, max_length, doc_stride)
    room = max_length - int(windows.context_at[0]) - 1
    stock = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=max_length,
        stride=room - doc_stride,  # it counts what neighbours share
        return_overflowing_tokens=True,
        return_token_type_ids=True,
    )
    assert len(windows) > 1
    assert rows(windows) == stock["input_ids"]
    for window, types in enumerate(stock["token_type_ids"]):
        begin = int(windows.context_at[window])
        assert types == [0] * begin + [windows.context_type] * (len(types) - begin)


@pytest.mark.parametrize("made", [wordpiece, byte_pairs])
@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("The  small model reads.", "small model"),
        ("Le cafe\u0301 noir", "cafe\u0301"),
        ("the 👩‍🔬 won 🏆 twice", "won"),
        ("one\r\ntwo\r\nthree", "two\r\nthree"),
        ("tokenx", "tokenx"),
    ],
)
def test_an_answer_comes_back_from_its_tokens(made: Any, context: str, answer: str) -> None:
    question = asked(context, answer)
    windows = make_windows([question], made(), 64, 10)
    first, last = windows.answer[0] - windows.context_at[0]
    assert text_of(context, windows.offsets[0], first, last) == answer


def test_a_picture_of_several_bytes_is_whole() -> None:
    question = asked("he won 🏆 twice", "🏆")
    windows = make_windows([question], byte_pairs(), 64, 10)
    first, last = windows.answer[0] - windows.context_at[0]
    assert last - first + 1 >= 4  # four bytes, perhaps the blank before
    assert text_of("he won 🏆 twice", windows.offsets[0], first, last) == "🏆"


def test_an_answer_outside_a_window_is_no_answer_there() -> None:
    context = " ".join(["model"] * 20 + ["batch"] + ["layer"] * 20)
    windows = make_windows([asked(context, "batch")], wordpiece(), 24, 6)
    inside = (windows.first <= 20) & (windows.first + windows.num_context > 20)
    assert 0 < inside.sum() < len(windows)
    assert (windows.answer[~inside] == 0).all()
    place = windows.bounds[:-1] + windows.answer[:, 0]
    batch = wordpiece().convert_tokens_to_ids("batch")
    assert (windows.input_ids[place[inside]] == batch).all()
    assert windows.num_context.sum() >= 41
    assert int(windows.first[-1] + windows.num_context[-1]) == 41


def test_an_answer_cut_by_a_window_is_no_answer_there() -> None:
    context = " ".join(["model"] * 10 + ["batch", "batch"] + ["layer"] * 20)
    windows = make_windows([asked(context, "batch batch")], wordpiece(), 24, 1)
    cut = (windows.first == 11) | (windows.first + windows.num_context == 11)
    assert cut.any()
    assert (windows.answer[cut] == 0).all()


def test_impossible_questions_have_no_answer() -> None:
    assert make_windows([asked("the model", None)], wordpiece(), 64, 10).answer.tolist() == [[0, 0]]


def test_offsets_share_tokens_with_the_span() -> None:
    offsets = np.array([[0, 3], [3, 6], [7, 8], [7, 8], [9, 12]], np.int32)
    assert answer_tokens(offsets, (7, 8)) == (2, 3)  # two tokens in one character
    assert answer_tokens(offsets, (2, 4)) == (0, 1)
    assert answer_tokens(offsets, (6, 7)) is None  # a blank
    assert answer_tokens(offsets, (0, 12)) == (0, 4)
    assert answer_tokens(offsets[:0], (0, 1)) is None
    assert answer_tokens(offsets, None) is None


def test_long_questions_are_cut_and_counted() -> None:
    windows = make_windows([asked("the model", "model", "batch " * 100)], wordpiece(), 384, 128)
    assert (windows.cut_questions, int(windows.context_at[0])) == (1, 1 + 64 + 1)
    short = make_windows([asked("the model", "model", "batch " * 100)], wordpiece(), 20, 5)
    assert int(short.context_at[0]) == 1 + (20 - 3) // 2 + 1


@pytest.mark.parametrize(("max_length", "doc_stride"), [(128, 100), (128, 0), (4, 1)])
def test_windows_that_would_leave_out_text(max_length: int, doc_stride: int) -> None:
    with pytest.raises(
        UserError, match=f"windows of {max_length} tokens that begin every {doc_stride} tokens"
    ):
        make_windows([asked("the model", "model")], wordpiece(), max_length, doc_stride)


def test_widest_context_is_berts_rule() -> None:
    context = " ".join(["model"] * 30)
    windows = make_windows([asked(context, None), asked("the model", None, key="r")], wordpiece(), 24, 6)
    chosen = widest_context(windows)
    for token in range(30):
        scores = {}
        for window in np.flatnonzero(windows.question == 0):
            place = token - int(windows.first[window])
            count = int(windows.num_context[window])
            if 0 <= place < count:
                scores[window] = min(place, count - 1 - place) + 0.01 * count
        best = max(scores, key=lambda window: scores[window])
        for window in scores:
            assert chosen[window][token - windows.first[window]] == (window == best)
    assert chosen[-1].tolist() == [True, True]


def test_one_context_is_tokenised_once() -> None:
    seen: list[str] = []

    class Counting:
        def __init__(self) -> None:
            self.real = wordpiece()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def __call__(self, texts: Any, *more: Any, **options: Any) -> Any:
            seen.extend(texts if isinstance(texts, list) else [])
            return self.real(texts, *more, **options)

    questions = [asked("the model", "model", key=str(index)) for index in range(5)]
    windows = make_windows(questions, Counting(), 64, 10)
    assert (len(windows), seen) == (5, ["the model", "what reads?"])
