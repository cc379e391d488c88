"""Files and hub datasets to texts and labels, and what is refused on the way."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_tasks import write_pairs, write_sst2
from train.errors import UserError
from train.finetuning.data.examples import Examples
from train.finetuning.data.readers import hub_name, read_task, read_unlabelled
from train.finetuning.tasks import SPLIT_OFF, task_named


def read(task: str, data: Path) -> tuple[Examples, dict[str, Examples], list[str]]:
    said: list[str] = []
    train, dev = read_task(task_named(task), str(data), said.append)
    return train, dev, said


def refused(task: str, data: Path, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(task, data)


def put(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.tsv").write_text(text)
    return folder


def test_the_folder_of_the_task_or_of_all_tasks(tmp_path: Path) -> None:
    write_sst2(tmp_path, 8, 4)
    for data in (tmp_path, tmp_path / "SST-2"):
        train, dev, _ = read("sst2", data)
        assert (len(train), len(dev["dev"]), train.second) == (8, 4, None)
        assert train.labels.tolist() == [1, 0] * 4


def test_cola_has_no_header_and_quotes_are_text(tmp_path: Path) -> None:
    rows = 'gj04\t1\t\t"Open quote\nbc01\t0\t*\tNext line\u2028same text.\n'
    train, _, _ = read("cola", put(tmp_path / "CoLA", train=rows, dev=rows))
    assert train.first == ['"Open quote', "Next line\u2028same text."]
    assert train.labels.tolist() == [1, 0]
    headed = "index\tsentence\n0\tA test set.\n"
    refused(
        "cola",
        put(tmp_path / "b", train=rows, dev=headed),
        "dev.tsv has no column label; it has index, sentence",
    )


def test_columns_go_by_their_names_in_the_original_files(tmp_path: Path) -> None:
    mrpc = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tone\ttwo\n"
    train, _, _ = read("mrpc", put(tmp_path / "MRPC", train=mrpc, dev=mrpc))
    assert (train.first, train.second, train.labels.tolist()) == (["one"], ["two"], [0])
    qqp = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n" + "1\t2\t3\ta\tb\t1\n" * 300 + "1\t2\n"
    train, _, said = read("qqp", put(tmp_path / "QQP", train=qqp, dev=qqp))
    assert len(train) == 300
    assert "1 rows without 6 columns are left out; the first is row 302" in said[0]
    stsb = "index\tsentence1\tsentence2\tscore\n0\ta\tb\t3.800\n"
    train, _, _ = read("stsb", put(tmp_path / "STS-B", train=stsb, dev=stsb))
    assert train.labels.dtype == np.float32
    assert train.labels.tolist() == pytest.approx([3.8])


def test_labels_by_name_in_the_hubs_order_and_both_dev_sets_of_mnli(tmp_path: Path) -> None:
    header, labels = "index\tsentence1\tsentence2\tgold_label", ["contradiction", "entailment", "neutral"]
    write_pairs(tmp_path / "MNLI", header, labels, ("train", "dev_matched", "dev_mismatched"), 6)
    train, dev, said = read("mnli", tmp_path)
    assert train.labels.tolist() == [2, 0, 1, 2, 0, 1]
    assert (list(dev), said) == (["matched", "mismatched"], [])
    (tmp_path / "MNLI" / "dev_mismatched.tsv").unlink()
    _, dev, said = read("mnli", tmp_path)
    assert list(dev) == ["matched"]
    assert "there is no mismatched set; scored without" in said[0]


def test_imdb_as_jsonl_splits_a_dev_set_off(tmp_path: Path) -> None:
    rows = [{"id": str(index), "text": f"text {index}", "label": index % 2} for index in range(200)]

    def write(kept: list[dict]) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in kept)
        (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(lines.encode()))

    write(rows)
    train, dev, said = read("imdb", tmp_path)
    assert len(train) + len(dev[SPLIT_OFF]) == 200
    assert 8 <= len(dev[SPLIT_OFF]) <= 35
    assert not set(train.first) & set(dev[SPLIT_OFF].first)
    assert f"{len(dev[SPLIT_OFF])} of its examples serve as one, chosen by a hash" in said[0]
    write(rows[50:])
    assert set(read("imdb", tmp_path)[1][SPLIT_OFF].first) == set(dev[SPLIT_OFF].first) - {
        f"text {i}" for i in range(50)
    }
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert len(read("imdb", tmp_path)[1]["dev"]) == 1


def test_imdb_as_the_folders_of_aclimdb(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("pos", "neg"):
            place = tmp_path / "aclImdb" / split / label
            place.mkdir(parents=True)
            (place / "0_9.txt").write_text(f"{split} {label}")
        (tmp_path / "aclImdb" / split / "unsup").mkdir()
    train, dev, _ = read("imdb", tmp_path)
    assert (train.first, train.labels.tolist()) == (["train neg", "train pos"], [0, 1])
    assert dev["dev"].first == ["test neg", "test pos"]


@pytest.mark.parametrize(
    ("dev", "said"),
    [
        (
            "sentence\tlabel\nok\t1\nbad\t2\n",
            r"dev.tsv, row 3: label is '2'; SST-2 has 0 \(negative\), 1 \(positive\): correct it, or remove the row",
        ),
        ("sentence\tlabel\nok\t-1\n", "row 2: label is -1: this is a test set without labels"),
        (
            "index\tsentence\n0\tok\n",
            "has no column label; it has index, sentence; .*A test set without labels",
        ),
        ("text\tlabel\nok\t1\n", "has no column sentence; it has text, label; SST-2 wants sentence, label"),
        ("", "dev.tsv is empty"),
        ("sentence\tlabel\n", "dev.tsv holds no examples"),
        (
            "sentence\tlabel\nok\t1\tx\n",
            "1 of 1 rows do not have the 2 columns sentence, label; the first is row 2",
        ),
    ],
)
def test_bad_rows_and_columns_are_named(tmp_path: Path, dev: str, said: str) -> None:
    refused("sst2", put(tmp_path, train="sentence\tlabel\nok\t1\n", dev=dev), said)


def test_bad_files_are_named(tmp_path: Path) -> None:
    refused("sst2", tmp_path / "none", "there is no folder")
    refused("sst2", tmp_path, r"no training set of SST-2 in .*looked for train.tsv\|.*SST-2")
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nok\t1\n")
    refused("sst2", tmp_path, "has no dev set: SST-2 wants dev.tsv")
    refused("sst2", tmp_path / "train.tsv", "is a file; give the folder")
    (tmp_path / "dev.jsonl").write_text('{"sentence": 3, "label": 1}\n')
    refused("sst2", tmp_path, "dev.jsonl, row 1: sentence is 3, not a text")
    (tmp_path / "dev.jsonl").write_text('{"sentence": "a"\n')
    refused("sst2", tmp_path, "dev.jsonl, row 1 is damaged .*; mend it")
    (tmp_path / "dev.tsv").write_bytes(b"sentence\tlabel\nok\t1\n\xff\t1\n")
    refused("sst2", tmp_path, "dev.tsv, row 3: not UTF-8")
    (tmp_path / "dev.tsv").unlink()
    (tmp_path / "dev.tsv.gz").write_bytes(gzip.compress(b"sentence\tlabel\n" + b"ok\t1\n" * 99)[:-9])
    refused("sst2", tmp_path, "dev.tsv.gz is damaged or cut short")
    stsb = "sentence1\tsentence2\tscore\na\tb\t5.1\n"
    refused(
        "stsb",
        put(tmp_path / "s", train=stsb, dev=stsb),
        "row 2: score is '5.1'; STS-B has numbers from 0 to 5",
    )


def test_unlabelled_texts(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    texts = read_unlabelled(task_named("sst2"), tmp_path / "a.txt", said.append)
    assert (texts.first, texts.labels.tolist()) == (["one", "two"], [-100, -100])
    with pytest.raises(
        UserError, match=r"RTE is about pairs of texts; give a .tsv or .jsonl with the columns sentence1"
    ):
        read_unlabelled(task_named("rte"), tmp_path / "a.txt", said.append)
    (tmp_path / "b.jsonl").write_text('{"sentence1": "a", "sentence2": "b"}\n')
    pairs = read_unlabelled(task_named("stsb"), tmp_path / "b.jsonl", said.append)
    assert pairs.second == ["b"]
    assert np.isnan(pairs.labels).all()
    (tmp_path / "c.tsv").write_text("sentence\nfour words and more\n")
    assert read_unlabelled(task_named("cola"), tmp_path / "c.tsv", said.append).first == [
        "four words and more"
    ]
    (tmp_path / "d.xls").write_text("x")
    with pytest.raises(UserError, match=r"give a .txt, .csv, .tsv or .jsonl file"):
        read_unlabelled(task_named("sst2"), tmp_path / "d.xls", said.append)
    with pytest.raises(UserError, match="there is no such file"):
        read_unlabelled(task_named("sst2"), tmp_path / "e.txt", said.append)


def test_the_hub_through_a_local_dataset(tmp_path: Path) -> None:
    """`datasets` takes a local folder for a hub dataset, which spares the network here."""
    import datasets

    labels = datasets.ClassLabel(names=["positive", "negative"])
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": labels, "idx": datasets.Value("int32")}
    )
    for split, label in (("train", 0), ("validation", 1), ("test", -1)):
        rows = {"sentence": [f"{split} text"] * 3, "label": [label] * 3, "idx": [0, 1, 2]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    sst2 = task_named("sst2")
    assert hub_name(sst2, None) == ("nyu-mll/glue", "sst2")
    assert hub_name(sst2, "folder") is None
    name = hub_name(sst2, f"hub:{tmp_path}")
    assert name == (str(tmp_path), None)
    train, dev = read_task(sst2, f"hub:{tmp_path}", print)
    assert (train.first[0], train.labels.tolist()) == (
        "train text",
        [1, 1, 1],
    )  # by name: the order is another
    assert dev["dev"].labels.tolist() == [0, 0, 0]
    rows = {"premise": ["a"], "hypothesis": ["a"], "label": [0]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "m" / "train.parquet")
    with pytest.raises(UserError, match="has no split dev_matched or validation_matched; it has "):
        read_task(task_named("mnli"), f"hub:{tmp_path}/m", print)
    with pytest.raises(
        UserError, match=r"the dataset .*/gone cannot be loaded: .*; with local files, give --data FOLDER"
    ):
        read_task(sst2, f"hub:{tmp_path}/gone", print)
    with pytest.raises(UserError, match="write hub:NAME"):
        hub_name(sst2, "hub:")


def test_a_sample_is_always_the_same_one() -> None:
    texts = [str(index) for index in range(100)]
    examples = Examples(texts, None, np.arange(100), texts)
    sample = examples.sample(10)
    assert len(sample) == 10
    assert sample.first == examples.sample(10).first == sorted(sample.first, key=int)
    assert sample.digest() != examples.digest()
    assert examples.sample(100) is examples
