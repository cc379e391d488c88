"""SQuAD from files to scores with tiny models: trained, distilled, stopped and continued, refused."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.score_squad import main as score
from tests.conftest import WORDS
from tests.tiny_tasks import StopAfter, job_for, save_encoder
from tests.unit.finetuning.squad_tokenizers import byte_pairs, wordpiece
from train.errors import UserError
from train.finetuning.runs import check_task, run_task
from train.finetuning.settings import Job
from train.finetuning.squad import training as span
from train.finetuning.squad.features import make_windows
from train.finetuning.squad.questions import Question, find_squad_files, read_questions
from train.finetuning.tasks import task_named
from train.finetuning.training import Stopped

FILLERS = WORDS[:8]
ANSWERS = WORDS[8:]


def qa(key: int, words: list[str], asked: str) -> dict[str, Any]:
    """Ask for the word after the word that is asked about; impossible where that is not there."""
    text = words[words.index(asked) + 1] if asked in words else None
    answer = [{"text": text, "answer_start": " ".join(words).index(text)}] if text else []
    return {"id": f"q{key}", "question": asked, "answers": answer, "is_impossible": not answer}


def squad(path: Path, count: int, share_impossible: float = 0.0, seed: int = 0) -> Path:
    rng = random.Random(seed)
    paragraphs = []
    for key in range(count):
        words = rng.sample(FILLERS[:6], rng.randint(3, 6))
        asked = FILLERS[6] if rng.random() < share_impossible else words[rng.randrange(3)]
        if asked in words:
            words.insert(words.index(asked) + 1, rng.choice(ANSWERS))
        paragraphs.append({"context": " ".join(words), "qas": [qa(key, words, asked)]})
    content = json.dumps({"version": "1", "data": [{"title": "t", "paragraphs": paragraphs}]}).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "squad").mkdir()
    squad(folder / "squad" / "train-v1.1.json.gz", 96)
    squad(folder / "squad" / "dev-v1.1.json", 24, seed=1)
    squad(folder / "squad" / "train-v2.0.json", 96, 0.5)
    squad(folder / "squad" / "dev-v2.0.json.gz", 24, 0.5, seed=1)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("bert"), num_positions=32)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(
        tmp_path_factory.mktemp("student"), "distilbert", seed=1, num_layers=1, num_positions=32
    )


def job(model: str, data: Path | str, out: Path, *more: str, task: str = "squad") -> Job:
    """Whose `say` prints nothing."""
    return job_for(
        out, model, task, data, "--learning-rate", "2e-3", "--epochs", "1", "--batch-size", "8", *more
    )[0]


@pytest.fixture(scope="module")
def trained(bert: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT/squad of a teacher that has learned the game."""
    out = tmp_path_factory.mktemp("out")
    run_task(job(bert, data, out, "--epochs", "12"), [0])
    return out / "squad"


def test_it_learns_and_leaves_what_the_official_scorer_scores_alike(
    trained: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = json.loads((trained / "scores.json").read_text())
    median = scores["median"]
    assert median["exact_match"] > 60  # by chance one word in five
    assert median["score"] == median["f1"]
    assert (scores["train_examples"], scores["dev_examples"]) == (96, {"dev": 24})
    predictions = trained / "seed-0" / "predictions.json"
    assert score([str(data / "squad" / "dev-v1.1.json"), str(predictions)]) == 0
    official = json.loads(capsys.readouterr().out)
    assert official == {"exact_match": median["exact_match"], "f1": median["f1"], "total": 24}
    best = json.loads((trained / "seed-0" / "nbest_predictions.json").read_text())
    assert {key: texts[0]["text"] for key, texts in best.items()} == json.loads(predictions.read_text())


def test_stock_transformers_answers_alike(trained: Path, data: Path) -> None:
    """The folder stands on its own: the stock classes find the same span in it."""
    import torch
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    folder = trained / "seed-0"
    model, tokenizer = (
        AutoModelForQuestionAnswering.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    predictions = json.loads((folder / "predictions.json").read_text())
    paragraphs = json.loads((data / "squad" / "dev-v1.1.json").read_text())["data"][0]["paragraphs"]
    for paragraph in paragraphs[:6]:
        question = paragraph["qas"][0]
        batch = tokenizer(question["question"], paragraph["context"], return_tensors="pt")
        outputs = model(**batch)
        begin = batch["input_ids"][0].tolist().index(tokenizer.sep_token_id) + 1
        scores = outputs.start_logits[0, begin:-1, None] + outputs.end_logits[0, None, begin:-1]
        backwards = torch.ones_like(scores).tril(-1).bool()
        scores = scores.masked_fill(backwards, -torch.inf).detach().numpy()
        first, last = np.unravel_index(int(scores.argmax()), scores.shape)
        ids = batch["input_ids"][0, begin + int(first) : begin + int(last) + 1]
        assert tokenizer.decode(ids) == predictions[question["id"]]


def test_squad_2_tells_what_has_no_answer(bert: str, data: Path, tmp_path: Path) -> None:
    scores = run_task(job(bert, data, tmp_path, "--epochs", "12", task="squad_v2"), [0])
    median = scores["median"]
    assert median["NoAns_f1"] > 90
    assert median["f1"] > 60
    assert median["best_f1"] >= median["f1"]
    folder = tmp_path / "squad_v2" / "seed-0"
    predictions = json.loads((folder / "predictions.json").read_text())
    nulls = json.loads((folder / "null_odds.json").read_text())
    assert any(predictions.values())
    assert {key for key, text in predictions.items() if not text} == {
        key for key in nulls if nulls[key] > 0.0
    }


def test_a_student_learns_from_teachers(
    trained: Path, student: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = str(trained / "seed-0")
    arguments = ("--epochs", "12", "--hard-weight", "0", "--teacher", teacher, teacher)
    scores = run_task(job(student, data, tmp_path, *arguments), [0])
    assert scores["median"]["exact_match"] > 40
    assert scores["settings"]["temperature"] == 2.0
    kept = list((tmp_path / "squad" / "soft-labels").iterdir())
    assert len(kept) == 1  # both are one and the same
    monkeypatch.setattr(span, "load_finetuned", None)  # nobody is asked again
    run_task(job(student, data, tmp_path, *arguments), [0, 1])


def test_soft_labels_are_what_the_teacher_says(
    trained: Path, student: str, data: Path, tmp_path: Path
) -> None:
    teacher = str(trained / "seed-0")
    runner = span.SpanRunner(job(student, data, tmp_path, "--teacher", teacher, "--temperature", "1"))
    soft = np.concatenate([example["soft_spans"] for example in runner.data.examples], axis=1)
    windows = runner._windows
    # The teacher knows these answers by heart: it is nearly sure of where they begin and end.
    places = windows.bounds[:-1, None] + windows.answer
    assert np.median(soft[[[0], [1]], places.T]) > 0.5


def test_a_batch_is_what_the_stock_tokenizer_gives() -> None:
    tokenizer = wordpiece()
    questions = [
        Question("a", "fast?", "the model reads", ("the model",), (0,)),
        Question("b", "which?", "a student", ("student",), (2,)),
    ]
    windows = make_windows(questions, tokenizer, 32, 8)
    soft = np.arange(2 * len(windows.input_ids), dtype=np.float32).reshape(2, -1)
    examples = span.window_examples(windows, token_types=True, labelled=True, soft=soft)
    batch = span.SpanPadding(tokenizer.pad_token_id)([*examples])
    stock = tokenizer(
        ["fast?", "which?"],
        ["the model reads", "a student"],
        padding=True,
        return_token_type_ids=True,
        return_tensors="pt",
    )
    for name, expected in stock.items():
        assert batch[name].tolist() == expected.tolist(), name
    for row, words in enumerate((("the", "model"), ("student", "student"))):
        for name, word in zip(("start_positions", "end_positions"), words, strict=True):
            assert batch["input_ids"][row, int(batch[name][row])] == tokenizer.convert_tokens_to_ids(word)
        own = slice(int(windows.bounds[row]), int(windows.bounds[row + 1]))
        length = own.stop - own.start
        assert batch["soft_spans"][row, :, :length].tolist() == soft[:, own].tolist()
        assert not batch["soft_spans"][row, :, length:].any()


def test_stopped_and_continued_is_the_same(student: str, data: Path, tmp_path: Path) -> None:
    whole = run_task(job(student, data, tmp_path / "whole"), [3])
    stopped = replace(job(student, data, tmp_path / "stopped"), stop=StopAfter(5))
    with pytest.raises(Stopped):
        run_task(stopped, [3])
    assert not (tmp_path / "stopped" / "squad" / "seed-3").exists()
    said: list[str] = []
    continued = run_task(replace(stopped, stop=None, say=said.append), [3])
    assert any(line.startswith("squad seed 3: going on from step") for line in said), said
    assert continued["median"] == whole["median"]
    for name in ("predictions.json", "nbest_predictions.json", "model.safetensors"):
        files = [tmp_path / run / "squad" / "seed-3" / name for run in ("whole", "stopped")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_smaller_windows_are_said(student: str, data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    span.SpanRunner(replace(job(student, data, tmp_path), say=said.append))
    assert said == [
        "squad: windows of 32 tokens, not 384: there are no more positions",
        "squad: windows begin every 15 tokens, not 128, so that none of the context is left out beside a long question",
    ]
    said.clear()
    span.SpanRunner(
        replace(job(student, data, tmp_path, "--max-length", "20", "--doc-stride", "5"), say=said.append)
    )
    assert said == []


def test_a_context_of_many_windows_is_answered(trained: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    squad(folder / "train.json", 8)
    content = json.loads(squad(folder / "dev.json", 8).read_text())
    for paragraph in content["data"][0]["paragraphs"]:
        paragraph["context"] += " 🏆\r\n" + "fast " * 200
    (folder / "dev.json").write_text(json.dumps(content))
    model = str(trained / "seed-0")
    run_task(job(model, folder, tmp_path), [0])
    predictions = json.loads((tmp_path / "squad" / "seed-0" / "predictions.json").read_text())
    contexts = [paragraph["context"] for paragraph in content["data"][0]["paragraphs"]]
    assert len(predictions) == 8
    assert all(text and text in context for text, context in zip(predictions.values(), contexts, strict=True))


def test_samples_are_fixed(student: str, data: Path, tmp_path: Path) -> None:
    made = job(student, data, tmp_path, "--max-train-examples", "10", "--max-eval-examples", "5")
    (train, dev), again = read_questions(made), read_questions(made)
    assert (train, dev) == again
    assert (len(train), len(dev)) == (10, 5)


def test_misplaced_answers_are_said(student: str, tmp_path: Path) -> None:
    content = json.loads(squad(tmp_path / "train.json", 200).read_text())
    content["data"][0]["paragraphs"][7]["qas"][0]["answers"][0]["answer_start"] += 1
    (tmp_path / "train.json").write_text(json.dumps(content))
    squad(tmp_path / "dev.json", 5)
    said: list[str] = []
    train, _ = read_questions(replace(job(student, tmp_path, tmp_path / "out"), say=said.append))
    assert len(train) == 199
    assert said == [
        "squad: 1 of 200 training questions are left out, their answers do not stand where answer_start says: q7"
    ]


def test_where_files_are(data: Path, tmp_path: Path) -> None:
    one, two = task_named("squad"), task_named("squad_v2")
    for place in (data, data / "squad"):
        assert find_squad_files(one, str(place))["train"] == data / "squad" / "train-v1.1.json.gz"
        assert find_squad_files(two, str(place))["dev"] == data / "squad" / "dev-v2.0.json.gz"
    with pytest.raises(
        UserError, match=r"no questions of SQuAD 1\.1 in .*: looked for train-v1\.1\.json and"
    ):
        find_squad_files(one, str(tmp_path))
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no dev set of SQuAD 1\.1: dev-v1\.1\.json or "):
        find_squad_files(one, str(tmp_path))
    with pytest.raises(UserError, match="there is no folder"):
        find_squad_files(one, str(tmp_path / "none"))
    with pytest.raises(UserError, match="is a file; give the folder"):
        find_squad_files(one, str(tmp_path / "train.json"))


def test_the_hubs_splits(student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    row = {
        "id": "q",
        "question": "a",
        "context": "the model",
        "answers": {"text": ["model"], "answer_start": [4]},
    }
    splits: dict[str, Any] = {"train": [row], "validation": [row]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: splits)
    train, dev = read_questions(job(student, "hub:mine/squad", tmp_path))
    assert train == dev
    assert train[0].span == (4, 9)
    del splits["validation"]
    with pytest.raises(
        UserError, match="the dataset mine/squad has no split dev or validation; it has train"
    ):
        read_questions(job(student, "hub:mine/squad", tmp_path))


def test_one_version_is_not_the_other(student: str, data: Path, tmp_path: Path) -> None:
    for version in ("1.1", "2.0"):
        folder = tmp_path / version
        folder.mkdir()
        share = 0.5 if version == "2.0" else 0.0
        squad(folder / "train.json", 8, share)
        squad(folder / "dev.json", 8, share)
        task, right = ("squad", "squad_v2") if version == "2.0" else ("squad_v2", "squad")
        with pytest.raises(UserError, match=f"as in SQuAD {version}; give --task {right}"):
            read_questions(job(student, folder, tmp_path, task=task))


def test_what_cannot_be_is_refused_at_once(
    bert: str, student: str, trained: Path, data: Path, tmp_path: Path
) -> None:
    told_to_label = job(
        student, data, tmp_path, "--unlabelled", "x.txt", "--teacher", str(trained / "seed-0")
    )
    with pytest.raises(UserError, match="--unlabelled has no effect on squad"):
        check_task(told_to_label)
    with pytest.raises(UserError, match="no questions of SQuAD"):
        check_task(job(student, tmp_path, tmp_path))
    with pytest.raises(UserError, match="--doc-stride is 0; give at least 1"):
        job(student, data, tmp_path, "--doc-stride", "0")
    with pytest.raises(UserError, match="--max-answer-length is -3; give at least 1"):
        job(student, data, tmp_path, "--max-answer-length", "-3")
    with pytest.raises(UserError, match="windows of 4 tokens have no room for a question"):
        check_task(job(student, data, tmp_path, "--max-length", "4"))
    with pytest.raises(UserError, match="is not fine-tuned: qa_outputs"):
        span.SpanRunner(job(student, data, tmp_path, "--teacher", bert))


def test_a_teacher_of_another_tokenizer_is_refused(student: str, data: Path, tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaForQuestionAnswering

    tokenizer = byte_pairs()
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=40, **shape)
    RobertaForQuestionAnswering(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    teacher = str(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"--teacher .*teacher has another tokenizer than .*student"):
        check_task(job(student, data, tmp_path, "--teacher", teacher))
    wordpiece(words=WORDS[::-1]).save_pretrained(tmp_path / "teacher")  # as many tokens, in another order
    with pytest.raises(UserError, match="has another tokenizer than"):
        check_task(job(student, data, tmp_path, "--teacher", teacher))
    tokenizer.save_pretrained(tmp_path / "teacher")
    # As a model of its own it does: no token types, two separators, its first positions are not used.
    scores = run_task(
        job(teacher, data, tmp_path, "--max-train-examples", "8", "--max-eval-examples", "4"), [0]
    )
    assert 0.0 <= scores["median"]["f1"] <= 100.0
