"""Tasks of a user's own: files to scores, for every type of label."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seqeval.metrics import f1_score as entity_f1
from transformers import AutoConfig, AutoTokenizer, pipeline

from launch.finetune import job_of, own_options, parser, tasks_of
from tests.tiny_tasks import FILLERS, save_encoder
from tests.unit.finetuning.squad_tokenizers import byte_pairs, wordpiece
from train.errors import UserError
from train.finetuning.data.readers import read_task
from train.finetuning.metrics import score_predictions, score_tags
from train.finetuning.runs import run_task
from train.finetuning.settings import Job
from train.finetuning.soft_labels import mean_soft_labels, soft_label_loss
from train.finetuning.tagging import encode_words
from train.finetuning.tasks import SPLIT_OFF

TOPICS = ("World", "Sports", "Business", "Sci/Tech")
QUICK = ("--epochs", "6", "--learning-rate", "0.01", "--batch-size", "8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoder(tmp_path_factory.mktemp("models") / "bert")


def own_job(out: Path, model: str, task: str, *flags: str) -> tuple[Job, list[str]]:
    """(the job of a command line, what it says)."""
    parsed = parser().parse_args(["--model", model, "--task", task, "--out", str(out), *flags])
    said: list[str] = []
    [task_made] = tasks_of(parsed.task, own_options(parsed))
    return dataclasses.replace(job_of(task_made, parsed), say=said.append), said


def texts_with(cues: list[str], count: int, seed: int) -> list[tuple[str, int]]:
    """(text, which of the cues is in it)."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        words = [*rng.choices(FILLERS[len(cues) :], k=rng.randint(1, 7)), cues[index % len(cues)]]
        rng.shuffle(words)
        rows.append((" ".join(words), index % len(cues)))
    return rows


def write_news(path: Path, count: int, seed: int, header: bool = True) -> Path:
    """A file as AG News': topic, title, description; a comma, quotes and a line break in each description."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        if header:
            writer.writerow(["topic", "title", "description"])
        for text, topic in texts_with(FILLERS[:4], count, seed):
            writer.writerow([TOPICS[topic], text, f'one, "two"\nthree {text}'])
    return path


def write_entities(path: Path, count: int, seed: int) -> Path:
    """CoNLL of four columns: people have two words, places one; both have their cue words."""
    rng = random.Random(seed)
    blocks = ["-DOCSTART- -X- -X- O\n"]
    for _ in range(count):
        words: list[tuple[str, str]] = []
        for _ in range(rng.randint(1, 3)):
            words += [(word, "O") for word in rng.choices(FILLERS[4:], k=rng.randint(0, 3))]
            if rng.random() < 0.5:
                words += [(FILLERS[0], "B-PER"), (FILLERS[1], "I-PER")]
            else:
                words += [(FILLERS[2], "B-LOC")]
        blocks.append("".join(f"{word} NN X {tag}\n" for word, tag in words))
    path.write_text("\n".join(blocks))
    return path


def test_four_classes_from_a_csv_for_teacher_and_student(tmp_path: Path, model: str) -> None:
    news, dev = write_news(tmp_path / "news.csv", 120, 0), write_news(tmp_path / "dev.csv", 40, 1)
    flags = ("--text", "title", "description", "--label", "topic", "--dev", str(dev), *QUICK)
    job, said = own_job(tmp_path / "teacher", model, f"csv:{news}", *flags)
    train, _ = read_task(job.task, job.data, said.append)
    assert train.second is not None
    assert train.second[0].startswith('one, "two"\nthree ')
    scores = run_task(job, [0])
    assert scores["metrics"] == ["accuracy", "macro_f1"]
    assert scores["median"]["accuracy"] > 90
    assert (scores["train_examples"], scores["dev_examples"]) == (120, {"dev": 40})
    assert scores["own"]["labels"] == sorted(TOPICS)
    config = AutoConfig.from_pretrained(tmp_path / "teacher/news/seed-0")
    assert list(config.id2label.values()) == sorted(TOPICS)

    small = save_encoder(tmp_path / "student-model", seed=3)
    teacher = str(tmp_path / "teacher/news/seed-0")
    job, _ = own_job(tmp_path / "student", small, f"csv:{news}", *flags, "--teacher", teacher)
    assert run_task(job, [0])["median"]["accuracy"] > 60
    other, _ = own_job(
        tmp_path / "student", small, f"csv:{news}", *flags, "--metrics", "matthews", "micro_f1"
    )
    assert other.task.metrics == ("matthews", "micro_f1")
    changed = (*flags[:4], "title", "--dev", str(dev), *QUICK)
    with pytest.raises(UserError, match=r"own.labels: .* -> .*|has \d+ labels"):
        run_task(own_job(tmp_path / "teacher", model, f"csv:{news}", *changed)[0], [0])


def test_a_dev_set_is_split_off_by_a_hash_and_rows_without_a_header_are_named(
    tmp_path: Path, model: str
) -> None:
    news = write_news(tmp_path / "train.csv", 200, 0, header=False)
    packed = tmp_path / "train.csv.gz"
    packed.write_bytes(gzip.compress(news.read_bytes()))
    flags = ("--columns", "topic", "title", "text", "--label", "topic")
    job, said = own_job(tmp_path / "out", model, f"csv:{packed}", *flags)
    assert job.task.name == tmp_path.name
    train, dev = read_task(job.task, job.data, said.append)
    assert len(train) + len(dev[SPLIT_OFF]) == 200
    assert 8 < len(dev[SPLIT_OFF]) < 40
    assert "no dev set given with" in said[0]
    assert not set(train.keys) & set(dev[SPLIT_OFF].keys)


def test_records_of_json_lines_need_not_have_the_same_fields(tmp_path: Path, model: str) -> None:
    """Nor ids: a null is none, and the text serves for the split."""
    rows: list[dict[str, Any]] = [{"text": f"text {n}", "label": n % 2, "id": None} for n in range(200)]
    rows[5]["extra"] = 1
    path = tmp_path / "kinds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job, said = own_job(tmp_path / "out", model, f"jsonl:{path}")
    train, dev = read_task(job.task, job.data, said.append)
    assert len(train) + len(dev[SPLIT_OFF]) == 200
    assert 8 <= len(dev[SPLIT_OFF]) <= 35
    del rows[0]["label"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"kinds\.jsonl, row 1: .*label"):
        own_job(tmp_path / "out", model, f"jsonl:{path}")


def test_other_metrics_than_those_of_a_finished_seed_are_refused(tmp_path: Path, model: str) -> None:
    path = write_news(tmp_path / "news.csv", 60, 0)
    flags = ("--text", "title", "--label", "topic", "--epochs", "1", "--max-length", "8")
    run_task(own_job(tmp_path / "out", model, f"csv:{path}", *flags)[0], range(1))
    for seeds in (range(1), range(2)):
        job, _ = own_job(tmp_path / "out", model, f"csv:{path}", *flags, "--metrics", "matthews")
        with pytest.raises(UserError, match=r"own\.metrics: \['accuracy', 'macro_f1'\] -> \['matthews'\]"):
            run_task(job, seeds)
    options = tmp_path / "out/news/options.json"
    written = json.loads(options.read_text())
    del written["own"]["metrics"], written["own"]["many"]  # as older versions wrote it
    options.write_text(json.dumps(written))
    assert run_task(own_job(tmp_path / "out", model, f"csv:{path}", *flags)[0], range(1))["seeds"]


def test_several_classes_for_a_text(tmp_path: Path, model: str) -> None:
    rows = []
    for first, second in zip(texts_with(FILLERS[:2], 120, 0), texts_with(FILLERS[2:4], 120, 1), strict=True):
        names = [("red", "blue")[first[1]], *(["tall"] if second[1] else [])]
        rows.append({"text": f"{first[0]} {second[0]}", "label": names})
    path = tmp_path / "kinds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job, _ = own_job(tmp_path / "out", model, f"jsonl:{path}", "--label-type", "classes", *QUICK)
    assert job.task.labels == ("blue", "red", "tall")
    scores = run_task(job, [0])
    assert scores["median"]["micro_f1"] > 80
    folder = tmp_path / "out/kinds/seed-0"
    assert AutoConfig.from_pretrained(folder).problem_type == "multi_label_classification"
    flags = ("--label-type", "classes", *QUICK, "--teacher", str(folder))
    taught, _ = own_job(tmp_path / "taught", model, f"jsonl:{path}", *flags)
    assert run_task(taught, [0])["median"]["micro_f1"] > 80

    for name, cells in (("json", json.dumps), ("bar", "|".join)):
        (tmp_path / f"{name}.csv").write_text("text,label\n")
        with (tmp_path / f"{name}.csv").open("a", newline="") as file:
            csv.writer(file).writerows([(row["text"], cells(row["label"])) for row in rows])
        job, _ = own_job(tmp_path / "out", model, f"csv:{tmp_path}/{name}.csv", "--label-type", "classes")
        assert job.task.labels == ("blue", "red", "tall")

    lines = ["text\tred\ttall", *(f"{row['text']}\t{int('red' in row['label'])}\t0" for row in rows)]
    (tmp_path / "columns.tsv").write_text("\n".join(lines))
    flags = ("--label", "red", "tall", "--label-type", "classes")
    job, said = own_job(tmp_path / "out", model, f"tsv:{tmp_path / 'columns.tsv'}", *flags)
    train, _ = read_task(job.task, job.data, said.append)
    assert train.labels[:, 0].mean() == pytest.approx(0.5, abs=0.06)
    assert train.labels[:, 1].sum() == 0


def test_numbers(tmp_path: Path, model: str) -> None:
    rows = texts_with(FILLERS[:4], 160, 0)
    lines = ["text,stars", *(f"{text},{topic - 1.5}" for text, topic in rows)]
    (tmp_path / "stars.csv").write_text("\n".join(lines))
    flags = ("--label", "stars", "--label-type", "number", *QUICK)
    job, _ = own_job(tmp_path / "out", model, f"csv:{tmp_path / 'stars.csv'}", *flags)
    scores = run_task(job, [0])
    assert scores["median"]["spearman"] > 80
    assert scores["metrics"] == ["pearson", "spearman"]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_entities_for_teacher_and_student(tmp_path: Path, family: str) -> None:
    train, dev = write_entities(tmp_path / "ner.conll", 100, 0), write_entities(tmp_path / "dev.conll", 30, 1)
    teacher = save_encoder(tmp_path / "teacher-model", family)
    flags = ("--dev", str(dev), *QUICK)
    job, _ = own_job(tmp_path / "teacher", teacher, f"conll:{train}", *flags)
    assert job.task.labels == ("O", "B-LOC", "B-PER", "I-PER")
    scores = run_task(job, [0])
    assert scores["metrics"] == ["entity_f1"]
    assert scores["median"]["entity_f1"] > 90
    assert scores["median"]["score"] == scores["median"]["entity_f1"]
    assert {"entity_precision", "entity_recall"} <= set(scores["median"])
    folder = tmp_path / "teacher/ner/seed-0"
    config = AutoConfig.from_pretrained(folder)
    assert config.label2id == {"O": 0, "B-LOC": 1, "B-PER": 2, "I-PER": 3}
    assert len(AutoTokenizer.from_pretrained(folder)) == config.vocab_size
    if family == "bert":  # whose tokens are words here; of others a word's first token alone is labelled
        find = pipeline("token-classification", str(folder), aggregation_strategy="simple", device="cpu")
        found = find(f"{FILLERS[7]} {FILLERS[0]} {FILLERS[1]} {FILLERS[2]}")
        assert [entity["entity_group"] for entity in found] == ["PER", "LOC"]

    # Another tokenizer than RoBERTa's.
    student = save_encoder(tmp_path / "student-model", num_layers=1, seed=3)
    job, _ = own_job(tmp_path / "student", student, f"conll:{train}", *flags, "--teacher", str(folder))
    assert run_task(job, [0])["median"]["entity_f1"] > 90


@pytest.mark.parametrize("tokenizer", [wordpiece, byte_pairs])
def test_words_are_found_among_their_tokens(tokenizer: Any) -> None:
    """As the tokenizer has it of one word after the other; a token that is a space is none of a word."""
    made, words = tokenizer(), ["fast", "unheard-of", "the", "\u0007", "slow"]
    [found] = encode_words(made, [words], 64, False)
    assert found["words"].tolist() in ([0, 1, 2, 4], [0, 1, 2, 3, 4])  # some drop control characters
    pieces = [
        made(word if index == 0 else f" {word}", add_special_tokens=False)["input_ids"]
        for index, word in enumerate(words)
    ]
    spaces = [int(tokenizer is byte_pairs and index > 0) for index in range(len(words))]
    places = 1 + np.cumsum([0, *map(len, pieces)])[:-1] + spaces
    assert found["places"].tolist() == places[found["words"]].tolist()
    assert found["input_ids"][1:-1].tolist() == [token for piece in pieces for token in piece]
    [short] = encode_words(made, [words], 3, False)
    assert short["words"].tolist() == [0]


def test_words_beyond_the_input_count_as_the_commonest_label(tmp_path: Path, model: str) -> None:
    path = tmp_path / "long.jsonl"
    words = [*[FILLERS[5]] * 20, FILLERS[2]]
    rows = [{"tokens": words, "tags": [*["O"] * 20, "B-LOC"]}] * 30
    path.write_text("".join(json.dumps({**row, "id": str(n)}) + "\n" for n, row in enumerate(rows)))
    flags = ("--label-type", "tags", "--max-length", "8", "--metrics", "accuracy", "entity_f1", *QUICK)
    job, said = own_job(tmp_path / "out", model, f"jsonl:{path}", *flags)
    scores = run_task(job, [0])
    assert any("words of the training set are beyond 8 tokens" in line for line in said)
    assert scores["median"]["accuracy"] == pytest.approx(100 * 20 / 21, abs=1e-3)
    assert scores["median"]["entity_f1"] == 0


def test_soft_labels_of_several_classes_are_their_formula() -> None:
    rng = np.random.default_rng(0)
    logits, first, second = (rng.normal(size=(3, 4)) for _ in range(3))
    labels = rng.integers(0, 2, (3, 4)).astype(float)
    labels[1] = np.nan
    target = mean_soft_labels([first, second], 2.0, many=True)

    def p(x: Any) -> Any:
        return 1 / (1 + np.exp(-x))

    wanted = (p(first / 2) + p(second / 2)) / 2
    assert target == pytest.approx(wanted, abs=1e-6)
    q, losses = p(logits / 2), []
    for row in range(3):
        kl = wanted[row] * np.log(wanted[row] / q[row]) + (1 - wanted[row]) * np.log(
            (1 - wanted[row]) / (1 - q[row])
        )
        truth = labels[row]
        ce = -(truth * np.log(p(logits[row])) + (1 - truth) * np.log(1 - p(logits[row])))
        weight = 0.0 if row == 1 else 0.25
        losses.append(weight * (0 if row == 1 else ce.mean()) + (1 - weight) * 4 * kl.mean())
    found = soft_label_loss(*map(torch.tensor, (logits, wanted, labels)), 2.0, 0.25)
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-10)


def test_scores_are_the_libraries(tmp_path: Path, model: str) -> None:
    write_entities(tmp_path / "t.conll", 20, 0)
    flags = ("--metrics", "entity_f1", "accuracy")
    job, _ = own_job(tmp_path, model, f"conll:{tmp_path / 't.conll'}", *flags)
    golds = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    guess = [["B-PER", "O", "O", "B-LOC"], ["O", "B-LOC"]]
    scores = score_tags(job.task, {"dev": golds}, {"dev": guess})
    assert scores["entity_f1"] == pytest.approx(100 * entity_f1(golds, guess))
    assert scores["entity_f1"] == pytest.approx(100 * 2 / 3)
    assert scores["accuracy"] == pytest.approx(100 * 5 / 6)
    assert scores["score"] == pytest.approx((scores["entity_f1"] + scores["accuracy"]) / 2)
    (tmp_path / "m.jsonl").write_text('{"text": "a", "label": ["x", "y"]}\n{"text": "b", "label": ["y"]}\n')
    job, _ = own_job(tmp_path, model, f"jsonl:{tmp_path / 'm.jsonl'}", "--label-type", "classes")
    outputs, labels = np.array([[1.0, -1.0], [-1.0, 2.0]]), np.array([[1.0, 1.0], [0.0, 1.0]])
    scores = score_predictions(job.task, {"dev": outputs}, {"dev": labels})
    assert scores["micro_f1"] == pytest.approx(100 * 4 / 5)
    assert scores["macro_f1"] == pytest.approx(100 * (1 + 2 / 3) / 2)
