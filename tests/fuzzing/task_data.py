"""What fine-tuning reads: tables of labelled texts, SQuAD's JSON, and the scores and options it left itself."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from launch.reporting.inputs import read_model_scores
from launch.reporting.scores import downstream_table, glue_table
from tests.fuzzing.target import Target, anything
from tests.tiny_tasks import sentences
from train.finetuning.data.readers import read_task, read_unlabelled
from train.finetuning.results import read_scores
from train.finetuning.runs import OPTIONS, _refuse_changes, finished_seeds
from train.finetuning.soft_labels import teacher_outputs
from train.finetuning.squad.questions import Question, read_null_scores, read_predictions, read_squad
from train.finetuning.tasks import TASKS

OPTIONS_OF_RUN = {"task": "sst2", "settings": {"epochs": 3.0, "batch_size": 32}, "contents": {"data": "abc"}}


def _make_tables(folder: Path) -> None:
    rows = sentences(24, 0)
    lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
    (folder / "train.tsv").write_text("\n".join(lines) + "\n")
    records = "".join(json.dumps({"sentence": text, "label": label}) + "\n" for text, label in rows)
    (folder / "dev.jsonl").write_text(records)
    (folder / "more.jsonl.gz").write_bytes(gzip.compress(records.encode(), mtime=0))


def _read_tables(folder: Path) -> Any:
    task, said = TASKS["sst2"], []
    train, dev = read_task(task, str(folder), said.append)
    more = read_unlabelled(task, folder / "more.jsonl.gz", said.append)
    return [
        (train.first, train.labels.tolist()),
        (dev["dev"].first, dev["dev"].labels.tolist()),
        more.first,
    ], said


def _as_the_rows_say(value: Any, expected: Any, folder: Path) -> str | None:
    """Whatever is left out is said; the rest is what stands in the file."""
    (train, dev, more), said = value
    text = (folder / "train.tsv").read_bytes().decode("utf-8-sig")
    header, *rows = [line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip()]
    good = [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]
    if len(good) < len(rows) and not said:
        return "rows are left out without a word"
    if [row["sentence"] for row in good] != train[0] or [_label(row["label"]) for row in good] != train[1]:
        return "train.tsv: other examples"
    lines = (folder / "dev.jsonl").read_bytes().decode("utf-8-sig").split("\n")
    records = [json.loads(line) for line in lines if line.strip()]
    if [r["sentence"] for r in records] != dev[0] or [_label(r["label"]) for r in records] != dev[1]:
        return "dev.jsonl: other examples"
    packed = gzip.decompress((folder / "more.jsonl.gz").read_bytes()).decode("utf-8-sig").split("\n")
    records = [json.loads(line) for line in packed if line.strip()]
    wanted = [record["sentence"] for record in records]
    return None if more == wanted else "more.jsonl.gz: something else than was packed"


def _label(value: Any) -> int:
    text = str(value).strip().lower()
    return {"negative": 0, "positive": 1}[text] if text in ("negative", "positive") else int(text)


def _make_squad(folder: Path) -> None:
    context = "In Paris it rains. In Rome the sun shines."
    qas = [
        {"id": f"q{index}", "question": f"Where {index}?", "answers": [{"text": "Rome", "answer_start": 22}]}
        for index in range(4)
    ]
    content = {"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": qas}]}]}
    (folder / "train-v1.1.json").write_text(json.dumps(content))
    (folder / "predictions.json").write_text(json.dumps({f"q{index}": "Rome" for index in range(4)}))
    (folder / "null_scores.json").write_text(json.dumps({f"q{index}": 0.5 for index in range(4)}))


def _read_squad(folder: Path) -> Any:
    return (
        read_squad(folder / "train-v1.1.json"),
        read_predictions(folder / "predictions.json"),
        read_null_scores(folder / "null_scores.json"),
    )


def _as_json_says(value: Any, expected: Any, folder: Path) -> str | None:
    content = json.loads((folder / "train-v1.1.json").read_text())
    wanted = []
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = [] if qa.get("is_impossible") is True else qa["answers"]
                texts = tuple(answer["text"] for answer in answers)
                starts = tuple(answer["answer_start"] for answer in answers)
                wanted.append(Question(qa["id"], qa["question"], paragraph["context"], texts, starts))
    if wanted != value[0]:
        return "other questions"
    for index, name in enumerate(("predictions.json", "null_scores.json"), start=1):
        said = json.loads((folder / name).read_text())
        if value[index] != {key: float(item) if index == 2 else item for key, item in said.items()}:
            return f"{name}: other values"
    return None


def _make_scores(folder: Path) -> None:
    task = folder / "sst2"
    scores = {"accuracy": 91.5, "score": 91.5, "seconds": 3.0}
    for seed in range(2):
        (task / f"seed-{seed}").mkdir(parents=True)
        (task / f"seed-{seed}" / "scores.json").write_text(json.dumps(scores))
    whole = {
        "task": "sst2", "model": "m", "teacher": [], "unlabelled": None, "parameters": 1000, "settings": {},
        "train_examples": 100, "dev_examples": {"dev": 50}, "metrics": ["accuracy"],
        "seeds": {"0": scores, "1": scores}, "median": {"accuracy": 91.5, "score": 91.5},
        "spread": {"accuracy": [91.5, 91.5], "score": [91.5, 91.5]}, "versions": {},
    }  # fmt: skip
    (task / "scores.json").write_text(json.dumps(whole, indent=2))
    (task / OPTIONS).write_text(json.dumps(OPTIONS_OF_RUN))


def _read_scores(folder: Path) -> Any:
    task = folder / "sst2"
    read_scores(task)
    finished_seeds(task)
    _refuse_changes(task, OPTIONS_OF_RUN)
    models = [read_model_scores("scores", folder)]
    return [table.as_markdown() for table in (glue_table(models), downstream_table(models)) if table]


def _read_soft_labels(folder: Path) -> list[list[float]]:
    def compute() -> np.ndarray:
        return np.linspace(-1, 1, 12, dtype=np.float32).reshape(6, 2)

    return teacher_outputs(folder, "teacher", ["data", "weights"], (6, 2), compute).tolist()


TARGETS = (
    Target("task-tables", _make_tables, _read_tables, _as_the_rows_say),
    Target("squad", _make_squad, _read_squad, _as_json_says),
    Target("scores", _make_scores, _read_scores, anything),
    Target("soft-labels", _read_soft_labels, _read_soft_labels),
)
