"""What is SQuAD and what is not; offsets in code points."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from train.errors import UserError
from train.finetuning.squad.questions import (
    Question,
    from_columns,
    has_unanswerable,
    named,
    read_null_scores,
    read_squad,
    trainable,
)

QA: dict[str, Any] = {"id": "q", "question": "Where?", "answers": [{"text": "Paris", "answer_start": 3}]}


def content(context: str = "In Paris.", **changes: Any) -> dict[str, Any]:
    qa = {key: value for key, value in {**QA, **changes}.items() if value is not ...}
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": [qa]}]}]}


def written(folder: Path, value: Any) -> Path:
    path = folder / "squad.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_reads_both_versions_compressed_or_not(tmp_path: Path) -> None:
    plain = read_squad(written(tmp_path, content()))
    assert plain == [Question("q", "Where?", "In Paris.", ("Paris",), (3,))]
    assert plain[0].span == (3, 8)
    assert not has_unanswerable(plain)
    packed = tmp_path / "two.json.gz"
    none = content(answers=[], is_impossible=True, plausible_answers=QA["answers"])
    packed.write_bytes(gzip.compress(json.dumps(none).encode()))
    (two,) = read_squad(packed)
    assert (two.answers, two.span, has_unanswerable([two])) == ((), None, True)


def test_plausible_answers_of_impossible_questions_are_none(tmp_path: Path) -> None:
    (question,) = read_squad(written(tmp_path, content(is_impossible=True)))
    assert question.answers == ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "squad.json is not a whole JSON file"),
        ([], "squad.json: not SQuAD: the whole: input should be an object"),
        ({"version": "1.1"}, "squad.json: not SQuAD: data is missing"),
        ({"data": {}}, "squad.json: not SQuAD: data: input should be a valid array"),
        ({"data": []}, "there are no questions in it"),
        ({"data": [{"title": "t"}]}, "squad.json: not SQuAD: data[0].paragraphs is missing"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, "data[0].paragraphs[0].context is missing"),
        ({"data": [{"paragraphs": [{"context": "x"}]}]}, "data[0].paragraphs[0].qas is missing"),
        (content(id=...), "data[0].paragraphs[0].qas[0].id is missing"),
        (content(question=...), "data[0].paragraphs[0].qas[0].question is missing"),
        (content(answers=...), "data[0].paragraphs[0].qas[0].answers is missing"),
        (content(answers=[{"text": "x"}]), "qas[0].answers[0].answer_start is missing"),
        (
            content(answers=[{"text": "x", "answer_start": "3"}]),
            "qas[0].answers[0].answer_start: input should be a valid integer",
        ),
        (content(" \n"), "the context of question q is empty"),
        (content("\ud83d in Paris"), "squad.json is not a whole JSON file (Invalid JSON: "),
    ],
)
def test_what_is_missing_is_named_with_its_place(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_squad(written(tmp_path, value))
    assert message in str(caught.value)


def test_a_cut_off_file(tmp_path: Path) -> None:
    path = tmp_path / "dev.json.gz"
    path.write_bytes(gzip.compress(json.dumps(content()).encode())[:-20])
    with pytest.raises(UserError, match=r"dev\.json\.gz is not a whole JSON file"):
        read_squad(path)


def test_ids_are_unique(tmp_path: Path) -> None:
    twice = content()
    twice["data"] *= 2
    with pytest.raises(UserError, match=r"several questions have one id \(q\)"):
        read_squad(written(tmp_path, twice))


def test_null_scores_are_numbers(tmp_path: Path) -> None:
    assert read_null_scores(written(tmp_path, {"q": 1})) == {"q": 1.0}
    with pytest.raises(UserError, match=r"not null scores, .*: q: input should be a valid number"):
        read_null_scores(written(tmp_path, {"q": True}))
    with pytest.raises(UserError, match=r"not null scores, .*: the whole: input should be an object"):
        read_null_scores(written(tmp_path, [1]))


ROW = {"id": "q", "question": "Where?", "context": "In Paris."}


def test_columns_of_the_hub() -> None:
    rows = [{**ROW, "answers": {"text": ["Paris"], "answer_start": [3]}}]
    assert from_columns(rows, "hub") == [Question("q", "Where?", "In Paris.", ("Paris",), (3,))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW, "hub, row 0: not SQuAD: answers is missing"),
        ({**ROW, "answers": {"text": ["x"]}}, "hub, row 0: not SQuAD: answers.answer_start is missing"),
        ({**ROW, "answers": {"text": ["x"], "answer_start": []}}, "1 answers, but 0 places where they start"),
        ({"id": "q"}, "hub, row 0: not SQuAD: question is missing"),
    ],
)
def test_columns_that_are_not(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_columns([row], "hub")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("context", "answer", "start"),
    [
        ("Cafe\u0301 noir, cafe\u0301", "cafe\u0301", 12),  # combining accents count
        ("👩‍🔬 won 🏆 twice", "🏆", 8),  # beyond the basic plane; three code points joined to one picture
        ("one\r\ntwo\r\nthree", "two", 5),  # CR and LF are a character each
        ("one\r\ntwo\r\nthree", "one\r\ntwo", 0),
    ],
)
def test_places_are_code_points(tmp_path: Path, context: str, answer: str, start: int) -> None:
    value = content(context, answers=[{"text": answer, "answer_start": start}])
    (question,) = read_squad(written(tmp_path, value))
    assert question.span == (start, start + len(answer))


def question(key: str, start: int) -> Question:
    return Question(key, "Where?", "In Paris.", ("Paris",), (start,))


def test_few_misplaced_answers_are_left_out_and_many_refused() -> None:
    good = [question(f"g{index}", 3) for index in range(199)]
    kept, left_out = trainable([*good, question("bad", 4)], "train")
    assert (kept, left_out) == (good, ["bad"])
    bad = [question("b0", 2), question("b1", -6), question("b2", 90)]
    with pytest.raises(UserError) as caught:
        trainable([*good, *bad], "train")
    assert "train: 3 of 202 answers do not stand at their answer_start in the context (b0, b1, b2)" in str(
        caught.value
    )


def test_the_first_answer_in_its_place_is_trained_on() -> None:
    two = Question("q", "Where?", "In Paris.", ("Rome", "Paris"), (3, 3))
    assert two.span == (3, 8)
    assert trainable([two], "train") == ([two], [])


def test_names_a_few() -> None:
    assert named(["a", "b"]) == "a, b"
    assert named([str(index) for index in range(8)]) == "0, 1, 2, 3, 4 and 3 more"
