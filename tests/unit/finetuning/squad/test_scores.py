"""SQuAD's official rules, by hand, and on two systems' published answers."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.score_squad import main
from tests.paths import ROOT
from train.errors import UserError
from train.finetuning.squad.questions import golds_of, read_predictions, read_squad
from train.finetuning.squad.scores import exact_match, f1_v1, f1_v2, normalise, score_v1, score_v2

needs_data = pytest.mark.skipif(
    "HALFLING_DATA" not in os.environ,
    reason="set HALFLING_DATA to a folder with squad/dev-v1.1.json.gz and published predictions",
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat,\tsat!", "cat sat"),
        ("a an the", ""),
        ("theatre", "theatre"),
        ("A.N. Other", "other"),  # punctuation goes first: "an" is then an article
        ("the-end", "theend"),
        ("“Quoted”", "“quoted”"),  # only ASCII punctuation goes
        ("\u00a0£5\u2009m", "£5 m"),
        ("ÉCOLE", "école"),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_f1_of_words_as_bags() -> None:
    # 2 of 3 predicted words are right, 2 of 2 gold words found: P = 2/3, R = 1, F1 = 0.8.
    assert f1_v1("Denver Broncos", "the Denver Broncos team") == pytest.approx(0.8)
    assert f1_v1("to be or not to be", "to to to") == pytest.approx(2 * 2 / (6 + 3))
    assert f1_v1("cat", "dog") == 0.0


def test_the_versions_differ_where_no_words_are_left() -> None:
    assert exact_match("the", "a") == 1.0
    assert (f1_v1("the", "a"), f1_v2("the", "a")) == (0.0, 1.0)
    assert (f1_v2("", "cat"), f1_v2("cat", ""), f1_v2("", "")) == (0.0, 0.0, 1.0)


def test_v1_takes_the_best_answer_and_counts_missing_ids() -> None:
    golds = {"q1": ("October 1973", "1973"), "q2": ("Denver Broncos",), "q3": ("x",)}
    scores = score_v1(golds, {"q1": "1973.", "q2": "Denver", "other": "x"})
    assert scores.metrics == {
        "exact_match": pytest.approx(100 / 3),
        "f1": pytest.approx(100 * (1 + 2 / 3) / 3),
    }
    assert (scores.total, scores.missing, scores.unknown) == (3, ("q3",), ("other",))


GOLDS = {"h1": ("Paris",), "h2": ("red wine",), "n1": (), "n2": ()}


def test_v2_splits() -> None:
    metrics = score_v2(GOLDS, {"h1": "paris", "h2": "wine", "n1": "", "n2": "Rome"}).metrics
    assert metrics == {
        "exact_match": 50.0,
        "f1": pytest.approx(100 * (1 + 2 / 3 + 1 + 0) / 4),
        "HasAns_exact_match": 50.0,
        "HasAns_f1": pytest.approx(100 * (1 + 2 / 3) / 2),
        "NoAns_exact_match": 50.0,
        "NoAns_f1": 50.0,
    }


def test_v2_thresholds() -> None:
    predictions = {"h1": "paris", "h2": "wine", "n1": "Rome", "n2": "Oslo"}
    null_scores = {"h1": 0.1, "h2": 0.4, "n1": 0.3, "n2": 0.9}
    # All silent: 2 of 4. Let h1 through: 3. Then n1: 2. Then h2: F1 2.67, exact still 2. Then n2.
    metrics = score_v2(GOLDS, predictions, null_scores, threshold=0.3).metrics
    assert (metrics["best_f1"], metrics["best_f1_threshold"]) == (75.0, 0.1)
    assert (metrics["best_exact_match"], metrics["best_exact_match_threshold"]) == (75.0, 0.1)
    # Above 0.3: h2 and n2 are silent, h1 right, n1 wrong.
    assert (metrics["exact_match"], metrics["HasAns_f1"], metrics["NoAns_f1"]) == (50.0, 50.0, 50.0)


def test_v2_null_scores_for_all() -> None:
    with pytest.raises(UserError, match=r"3 predictions have no null score \(the first: h2\)"):
        score_v2(GOLDS, dict.fromkeys(GOLDS, "x"), {"h1": 0.0})


def test_v1_refuses_questions_without_answers() -> None:
    with pytest.raises(UserError, match="question n1 has no answer"):
        score_v1(GOLDS, {})
    with pytest.raises(UserError, match="no questions"):
        score_v1({}, {})


@needs_data
@pytest.mark.parametrize(
    ("system", "exact", "f1", "num_missing"),
    [("bert_ensemble", 86.21, 92.20, 0), ("logreg", 40.14, 50.98, 13)],
)
def test_published_scores(system: str, exact: float, f1: float, num_missing: int) -> None:
    folder = Path(os.environ["HALFLING_DATA"], "squad")
    questions = read_squad(folder / "dev-v1.1.json.gz")
    predictions = read_predictions(folder / f"{system}_dev-v1.1_predictions.json.gz")
    scores = score_v1(golds_of(questions), predictions)
    assert (round(scores.metrics["exact_match"], 2), round(scores.metrics["f1"], 2)) == (exact, f1)
    assert (scores.total, len(scores.missing)) == (10570, num_missing)


def squad_file(path: Path, version: str, *paragraphs: dict[str, Any]) -> Path:
    content = {"version": version, "data": [{"title": "t", "paragraphs": list(paragraphs)}]}
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    return path


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    answers = [{"text": "Paris", "answer_start": 0}]
    qas = [{"id": key, "question": "Where?", "answers": answers} for key in ("q1", "q2")]
    return squad_file(tmp_path / "dev.json.gz", "1.1", {"context": "Paris it is", "qas": qas})


def written(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_the_command_line(dev: Path, tmp_path: Path) -> None:
    predictions = written(tmp_path, {"q1": "paris", "zz": "Rome"})
    command = [sys.executable, "launch/score_squad.py", str(dev), predictions]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"exact_match": 50.0, "f1": 50.0, "total": 2}
    assert done.stderr.splitlines() == [
        "1 questions have no prediction and count as 0: q2",
        "1 predictions have ids that no question has: zz",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [{"id": "q1"}],
            'not predictions, {question id: answer, "" for none}: the whole: input should be an object',
        ),
        (
            {"q1": None},
            'predictions.json: not predictions, {question id: answer, "" for none}: q1: input should be a valid string',
        ),
        ({"q1": 3}, "q1: input should be a valid string"),
        ({"zz": "Rome"}, "has any of its ids (zz); are they of another data set?"),
    ],
)
def test_predictions_that_are_none(dev: Path, tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        main([str(dev), written(tmp_path, content)])
    assert message in str(caught.value)


def test_null_scores_on_the_command_line(
    dev: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions, nulls = written(tmp_path, {"q1": "Paris", "q2": "Paris"}), tmp_path / "null_odds.json"
    nulls.write_text('{"q1": -1, "q2": 2.5}')
    with pytest.raises(UserError, match=r"every question of .* has an answer, none can be null"):
        main([str(dev), predictions, "--null-scores", str(nulls)])
    with pytest.raises(UserError, match="give --null-scores FILE too"):
        main([str(dev), predictions, "--threshold", "0"])
    answer = {"id": "q1", "question": "?", "answers": [{"text": "Paris", "answer_start": 0}]}
    none = {"id": "q2", "question": "?", "is_impossible": True, "answers": [], "plausible_answers": []}
    two = squad_file(tmp_path / "two.json.gz", "v2.0", {"context": "Paris", "qas": [answer, none]})
    with pytest.raises(UserError, match="--threshold nan: no score is above it; give a number"):
        main([str(two), predictions, "--null-scores", str(nulls), "--threshold", "nan"])
    assert main([str(two), predictions, "--null-scores", str(nulls), "--threshold", "0"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["f1"], scores["NoAns_f1"], scores["best_f1"], scores["best_f1_threshold"]) == (
        100,
        100,
        100,
        -1,
    )
