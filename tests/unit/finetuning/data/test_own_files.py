"""The files of tasks of one's own: labels, columns and splits, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.finetune import main
from tests.unit.finetuning.data.test_own import own_job
from train.errors import UserError
from train.finetuning.data.readers import read_task
from train.finetuning.tasks import SPLIT_OFF

CSV = "text,label\na,x\nb,y\n"


@pytest.mark.parametrize(
    ("files", "task", "flags", "said"),
    [
        ({"a.csv": CSV}, "csv:{}/b.csv", (), r"there is no file .*b.csv; give --task csv:FILE"),
        ({"a.csv": CSV}, "csv:{}/a.csv", ("--dev", "gone"), "there is no file gone"),
        ({"a.csv": CSV}, "csv:{}/a.csv", ("--text", "title"), "has no column title; it has text, label; .*--text"),
        ({"a.csv": CSV}, "csv:{}/a.csv", ("--label", "topic"), "has no column topic; it has text, label"),
        ({"a.csv": "text,label\n"}, "csv:{}/a.csv", (), "label has 0 labels"),
        ({"a.csv": "text,label\na,x\nb,x\n"}, "csv:{}/a.csv", (), r"has 1 labels \(all are 'x'\)"),
        ({"a.csv": "text,label\na,x\nb,\n"}, "csv:{}/a.csv", (), "row 3: label is '', no label"),
        ({"a.csv": 'text,label\na,"x\n'}, "csv:{}/a.csv", (), "row 2: no CSV"),
        ({"a.csv": "text,label\na,x,y\n"}, "csv:{}/a.csv", (), "do not have the 2 columns text, label"),
        ({"a.csv": CSV}, "csv:{}/a.csv", ("--columns", "text"), "3 of 3 rows do not have the 1 columns text"),
        ({"a.csv": CSV}, "csv:{}/a.csv", ("--label-type", "tags"), "tags are read from conll:FILE"),
        ({"a.csv": CSV}, "csv:{}/a.csv", ("--metrics", "spearman"), "no such metric of --label-type class"),
        ({"a.csv": CSV}, "csv:{}/a.csv", ("--text", "a", "b", "c"), "--text names 3 columns"),
        ({"a.csv": CSV}, "csv:{}/a.csv", ("--label", "a", "b"), "--label names 2 columns; .*--label-type classes"),
        ({"a.jsonl": '{"text": "a", "label": null}'}, "jsonl:{}/a.jsonl", (), "row 1: label is None, no label"),
        ({"a.jsonl": '{"text": "a", "label": ["x"]}'}, "jsonl:{}/a.jsonl", (), "another --label-type"),
        ({"a.jsonl": "{}"}, "jsonl:{}/a.jsonl", ("--columns", "x"), "--columns has no effect"),
        ({"a.conll": "a O\nb\n"}, "conll:{}/a.conll", (), "row 2: 1 columns where 2 are wanted"),
        ({"a.conll": "\n\n"}, "conll:{}/a.conll", (), "is empty"),
        ({"a.conll": "a X\nb Y\n"}, "conll:{}/a.conll", ("--metrics", "entity_f1"), "tags such as B-PER"),
        ({"a.conll": "a X\nb Y\n"}, "conll:{}/a.conll", ("--columns", "w", "t"), "names no column tokens"),
        ({"a.conll": "a X\nb Y\n"}, "conll:{}/a.conll", ("--label-type", "class"), "has tags; leave it out"),
        ({"a.conll": "a NN X\nb NN Y\n"}, "conll:{}/a.conll", ("--label", "pos"), "--label pos has no effect"),
        ({"a.conll": "a NN X\nb NN Y\n"}, "conll:{}/a.conll", ("--text", "w"), "--text w .*with --columns"),
    ],
)  # fmt: skip
def test_bad_tasks_are_refused_by_name(
    tmp_path: Path, files: dict[str, str], task: str, flags: tuple[str, ...], said: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        own_job(tmp_path / "out", "model", task.format(tmp_path), *flags)


@pytest.mark.parametrize(
    ("kind", "train", "dev", "flags", "said"),
    [
        ("csv", CSV, "text,label\na,z\n", (), "row 2: label is 'z'; a has the labels of its training set: x, y"),
        ("csv", CSV, "text,label\n", (), "dev.csv holds no examples"),
        ("csv", CSV, "", (), "dev.csv is empty"),
        ("csv", CSV, "text\na\n", (), "has no column label; it has text"),
        ("csv", CSV, None, (), "too small to split a dev set off"),
        ("csv", "text,label\na,1\nb,many\n", None, ("--label-type", "number"), "row 3: label is 'many'; a has numbers"),
        ("jsonl", '{"tokens": ["a", "b"], "tags": ["X", "Y"]}', '{"tokens": ["a", "b"], "tags": ["X"]}',
         ("--label-type", "tags"), "row 1: 2 words and 1 tags; give one tag for each word"),
        ("jsonl", '{"tokens": ["a", "b"], "tags": ["X", "Y"]}', '{"tokens": ["a"], "tags": ["Z"]}',
         ("--label-type", "tags"), "row 1: a tag is 'Z'"),
        ("jsonl", '{"tokens": ["a", "b"], "tags": ["X", "Y"]}', '{"tokens": "a", "tags": ["X"]}',
         ("--label-type", "tags"), "row 1: tokens is 'a', not a list of words"),
        ("jsonl", '{"text": "a", "label": ["x", "y"]}', '{"text": "a", "label": ["z"]}',
         ("--label-type", "classes"), "row 1: label is .'z'.; a has the labels"),
    ],
)  # fmt: skip
def test_bad_sets_are_refused_by_name(
    tmp_path: Path, kind: str, train: str, dev: str | None, flags: tuple[str, ...], said: str
) -> None:
    (tmp_path / f"a.{kind}").write_text(train)
    if dev is not None:
        (tmp_path / f"dev.{kind}").write_text(dev)
        flags = (*flags, "--dev", str(tmp_path / f"dev.{kind}"))
    job, heard = own_job(tmp_path / "out", "model", f"{kind}:{tmp_path / f'a.{kind}'}", *flags)
    with pytest.raises(UserError, match=said):
        read_task(job.task, job.data, heard.append)


def test_columns_of_conll_are_chosen_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("NN w B-X\nVB v O\n")
    flags = ("--columns", "pos", "word", "tag", "--text", "word", "--label", "pos", "--dev", str(path))
    job, said = own_job(tmp_path / "out", "model", f"conll:{path}", *flags)
    assert job.task.labels == ("NN", "VB")
    train, _ = read_task(job.task, job.data, said.append)
    assert train.first == [["w", "v"]]


def test_only_of_tags_o_comes_first(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,A\nb,O\nc,B\n")
    assert own_job(tmp_path, "model", f"csv:{tmp_path / 'a.csv'}")[0].task.labels == ("A", "B", "O")
    (tmp_path / "a.conll").write_text("a A\nb O\n")
    assert own_job(tmp_path, "model", f"conll:{tmp_path / 'a.conll'}")[0].task.labels == ("O", "A")


def test_options_of_own_tasks_want_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV)
    own = f"csv:{tmp_path / 'a.csv'}"
    for words, said in (
        (["sst2", "--dev", "x"], "--dev is about one --task of your own, as csv:FILE"),
        ([own, own, "--label-type", "number"], "there are 2; run one at a time"),
        ([own, "--data", "glue"], "--data has no effect"),
        ([own, "--unlabelled", "x"], "no effect without --teacher"),
    ):
        with pytest.raises(UserError, match=said):
            main(["--model", "m", "--out", str(tmp_path / "o"), "--task", *words])


def test_a_dataset_of_the_hub_as_a_task(tmp_path: Path) -> None:
    """`datasets` takes a local folder for a hub dataset."""
    import datasets

    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-X"]))
    features = datasets.Features({"words": datasets.Sequence(datasets.Value("string")), "ner_tags": tags})
    for split in ("train", "validation"):
        rows = {"words": [["a", "b"]] * 3, "ner_tags": [[0, 1]] * 3}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    job, said = own_job(tmp_path / "out", "model", f"hub:{tmp_path}", "--label-type", "tags")
    assert job.task.labels == ("O", "B-X")
    train, dev = read_task(job.task, job.data, said.append)
    assert [labels.tolist() for labels in train.labels] == [[0, 1]] * 3
    assert len(dev["dev"]) == 3


def test_a_dataset_of_the_hub_without_a_dev_split(tmp_path: Path) -> None:
    """As AG News, which has train and test alone."""
    import datasets

    for split in ("train", "test"):
        rows = {"text": [f"{split} {n}" for n in range(100)], "label": ["x", "y"] * 50}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{split}.parquet")
    name = f"hub:{tmp_path}"
    job, said = own_job(tmp_path / "out", "model", name)
    train, dev = read_task(job.task, job.data, said.append)
    assert len(train) + len(dev[SPLIT_OFF]) == 100
    assert all(text.startswith("train ") for text in [*train.first, *dev[SPLIT_OFF].first])
    assert f"no dev set beside {tmp_path}, split train: {len(dev[SPLIT_OFF])} of its examples" in said[0]
    with pytest.raises(UserError, match=r"--dev a has no effect on .*, else a tenth of its training set"):
        own_job(tmp_path / "out", "model", name, "--dev", "a")
