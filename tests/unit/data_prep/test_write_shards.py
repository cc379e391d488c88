"""Text to shards on one process: what is in them, what is dropped, what is refused."""

from __future__ import annotations

import errno
import functools
import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from transformers import AutoTokenizer

from data_prep import document_encoder, shard_pass, verify_shards, write_shards
from data_prep.document_encoder import Encoder
from data_prep.shard_format.manifest import Manifest, read_blocks
from data_prep.shard_format.tokenizer_info import tokenizer_info
from data_prep.sources import texts
from data_prep.sources.texts import normalised
from data_prep.work_folder import locked


def make(*arguments: Any) -> int:
    return write_shards.main([*map(str, arguments), "--processes", "1"])


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def documents_in(folder: Path, split: str = "train") -> list[tuple[int, ...]]:
    manifest = Manifest.load(folder)
    found = []
    for shard in manifest.splits[split]:
        with open(folder / shard.name, "rb") as file:
            for block in read_blocks(file):
                ends = np.flatnonzero(block == manifest.tokenizer.sep_id)
                found += [tuple(part[:-1].tolist()) for part in np.split(block, ends + 1) if len(part)]
    return found


@pytest.fixture
def corpus(tmp_path: Path, documents: list[str]) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture
def good(corpus: Path, tokenizer_folder: str) -> list[Any]:
    return [corpus, "--tokenizer", tokenizer_folder, "--heldout-fraction", 0.1, "--shard-tokens", 3000]


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


def test_special_tokens_in_a_text_are_ordinary(tmp_path: Path, tokenizer_folder: str) -> None:
    text = "a model [SEP] the [MASK] reads [CLS] [PAD] [UNK] fast student é"  # é: not the short cut
    (tmp_path / "a.txt").write_text(text)
    assert make(tmp_path / "a.txt", "--tokenizer", tokenizer_folder, "--out", tmp_path / "o") == 0
    (document,) = documents_in(tmp_path / "o")
    backend = AutoTokenizer.from_pretrained(tokenizer_folder).backend_tokenizer
    backend.encode_special_tokens = True
    assert list(document) == backend.encode(text, add_special_tokens=False).ids
    assert not set(document) & {0, 2, 3, 4}


def encoder_with_whole_words(tokenizer_folder: str) -> tuple[Encoder, Any]:
    """A tokenizer whose pre-tokeniser leaves "[SEP]" whole: as a word it is in the vocabulary."""
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    info = tokenizer_info(tokenizer)
    return Encoder(tokenizer.backend_tokenizer.to_str(), info), info


@pytest.mark.parametrize("long", [False, True])
def test_special_tokens_that_are_words_are_spelled_apart(
    tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    if long:
        monkeypatch.setattr(document_encoder, "LONG", 30)
        monkeypatch.setattr(texts, "PIECE", 16)
    encoder, info = encoder_with_whole_words(tokenizer_folder)
    inputs = [
        "the model reads a student",
        "the [SEP] model [MASK] reads the large [PAD] shard",
        "a fast batch",
    ]
    found = list(encoder.encode(inputs))
    for document in found:
        assert document.tokens[-1] == info.sep_id
        assert not set(document.tokens[:-1].tolist()) & {0, 2, 3, 4}
    plain = [[5, 7, 12, 6, 10], [6, 15, 18]]
    assert len(found[0].tokens) == len(plain[0]) + 1
    assert len(found[2].tokens) == len(plain[1]) + 1


def test_long_documents_give_the_same_tokens_in_pieces(
    tokenizer_folder: str, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    encoder = Encoder(tokenizer.backend_tokenizer.to_str(), tokenizer_info(tokenizer))
    whole = list(encoder.encode(documents[:40]))
    monkeypatch.setattr(document_encoder, "LONG", 50)
    monkeypatch.setattr(texts, "PIECE", 16)
    cut = list(encoder.encode(documents[:40]))
    for first, second in zip(whole, cut, strict=True):
        assert first.digest == second.digest
        np.testing.assert_array_equal(first.tokens, second.tokens)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.lists(
        st.text(max_size=12)
        | st.sampled_from(["Model", "\n", "\x0b", "\x7f", "\r\n", "É", "e\u0301", "漢", "[SEP]", " "])
    ).map("".join),
    lowercase=st.booleans(),
)
def test_ascii_lines_are_tokenised_as_the_tokenizer_does(
    tokenizer_folder: str, text: str, lowercase: bool
) -> None:
    """Against the tokenizer as it is: the short cut around its normaliser must not be seen."""
    encoder, backend = encoder_and_backend(tokenizer_folder, lowercase)
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    (found,) = encoder.encode([normalised(text)])
    assert found.tokens[:-1].tolist() == backend.encode(normalised(text), add_special_tokens=False).ids


@functools.cache
def encoder_and_backend(tokenizer_folder: str, lowercase: bool) -> tuple[Encoder, Tokenizer]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.backend_tokenizer.normalizer = BertNormalizer(lowercase=lowercase)
    encoder = Encoder(tokenizer.backend_tokenizer.to_str(), tokenizer_info(tokenizer))
    tokenizer.backend_tokenizer.encode_special_tokens = True
    return encoder, tokenizer.backend_tokenizer


# ------------------------------------------------------------------------------------------------ failures


def last_line(capsys: pytest.CaptureFixture) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_bad_record_stops_the_run_and_names_file_and_line(
    tmp_path: Path, good: list, corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    sound = corpus.read_text()
    corpus.write_text(sound + '{"text": "open\n' + sound)
    assert make(*good, "--out", tmp_path / "out") == 2
    assert re.search(
        r"write_shards: .*corpus\.jsonl, line 301: not valid JSON \(Unterminated string starting at column 10\); "
        r"mend it, or leave such records out with --on-bad-record skip",
        last_line(capsys),
    )
    assert not (tmp_path / "out" / "manifest.json").exists()
    corpus.write_text(sound)
    assert make(*good, "--out", tmp_path / "out") == 0, "once mended, the run starts over by itself"
    assert make(*good, "--out", tmp_path / "fresh") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_bad_records_are_skipped_counted_and_named(tmp_path: Path, good: list, corpus: Path) -> None:
    corpus.write_bytes(
        corpus.read_bytes() + b'{"text": "\xff"}\n{"body": 1}\n{"text": "\\udcff and words"}\n'
    )
    assert make(*good, "--out", tmp_path / "out", "--on-bad-record", "skip") == 0
    assert Manifest.load(tmp_path / "out").skipped["bad_records"] == 3
    named = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(record["where"] for record in named) == [
        f"{corpus}, line {line}" for line in (301, 302, 303)
    ]
    assert {record["problem"][:16] for record in named} == {
        "invalid UTF-8 (b",
        "no text field 't",
        "half of a surrog",
    }


def test_a_document_beyond_the_limit_is_refused_skipped_or_allowed(
    tmp_path: Path, good: list, corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    long = json.dumps({"text": "the model reads a " + "student " * 150_000})
    corpus.write_text(corpus.read_text() + long + "\n" + json.dumps({"text": "the last one " * 9}) + "\n")
    out = tmp_path / "out"
    assert make(*good, "--out", out, "--max-document-mb", 1) == 2
    assert re.search(
        r"corpus\.jsonl, line 301: a document of more than 1 MB \(raise --max-document-mb, .*; mend it, or leave",
        last_line(capsys),
    )
    assert make(*good, "--out", out, "--max-document-mb", 2) == 0, (
        "the same folder goes on with a higher limit"
    )
    assert make(*good, "--out", tmp_path / "default") == 0
    assert contents(out) == contents(tmp_path / "default"), "a limit that nothing meets is not seen"
    skipping = [*good, "--out", tmp_path / "skip", "--on-bad-record", "skip"]
    assert make(*skipping, "--max-document-mb", 1) == 0
    manifest = Manifest.load(tmp_path / "skip")
    assert manifest.skipped["bad_records"] == 1
    assert manifest.options["max_document_mb"] == 1
    assert "a document of more than 1 MB" in (tmp_path / "skip" / "skipped.jsonl").read_text()
    assert make(*skipping) == 2
    assert "was made with max_document_mb 1 instead of 64; choose" in last_line(capsys)


def test_folder_of_another_run_is_refused(
    tmp_path: Path, good: list, corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert make(*good, "--out", out) == 0
    made = contents(out)
    assert make(*good, "--out", out) == 0, "the same again is done at once"
    assert "complete already" in capsys.readouterr().out
    assert make(*good, "--out", out, "--seed", 5) == 2
    assert "was made with seed 0 instead of 5; choose another --out, or remove that folder" in last_line(
        capsys
    )
    assert make(corpus, *good, "--out", out) == 2
    assert "sources [" in last_line(capsys)
    corpus.write_text(corpus.read_text() + '{"text": "one more"}\n')
    assert make(*good, "--out", out) == 2
    assert "inputs that have changed since" in last_line(capsys)
    assert contents(out) == made


def test_folder_with_other_things_is_left_alone(
    tmp_path: Path, good: list, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    assert make(*good, "--out", tmp_path / "mine") == 2
    assert "is not empty (letter) and was not made by write_shards" in last_line(capsys)
    assert make(*good, "--out", tmp_path / "mine" / "letter") == 2
    assert "letter: is not a folder" in last_line(capsys)
    assert list(contents(tmp_path / "mine")) == ["letter"]


def test_two_runs_into_one_folder_are_refused(
    tmp_path: Path, good: list, capsys: pytest.CaptureFixture
) -> None:
    with locked(tmp_path / "out"):
        assert make(*good, "--out", tmp_path / "out") == 2
        assert "another run is writing into" in last_line(capsys)
    assert make(*good, "--out", tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--heldout-fraction", 1], "--heldout-fraction 1.0: must be at least 0 and below 1"),
        (["--heldout-fraction", "nan"], "--heldout-fraction nan: must be"),
        (["--min-tokens", 0], "--min-tokens 0: must be at least 1"),
        (["--shard-tokens", 5], "--shard-tokens 5: must be at least 1024"),
        (["--max-document-mb", 0], "--max-document-mb 0: must be between 1 and 2000"),
        (["--seed", -1], "--seed -1: must be at least 0"),
        (["--seed", 1 << 63], "must be below 2**63"),
        (["--text-field", ","], "--text-field ',': names no field"),
        (["--min-tokens", 999], "no document to write: 300 read, of which 300 have fewer than 999 tokens"),
        (["--heldout-fraction", 0.9999999], "documents fall to the held-out split; lower --heldout-fraction"),
        (["--tokenizer", "/no/such"], "--tokenizer /no/such: not a folder with a Hugging Face tokenizer"),
    ],
)
def test_bad_options(
    tmp_path: Path, good: list, changes: list, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert make(*good, "--out", tmp_path / "out", *changes) == 2
    assert message in last_line(capsys)


@pytest.mark.parametrize("content", [None, "nonsense", '{"version": "1.0"}', "[]"])
def test_folder_without_tokenizer(
    tmp_path: Path, good: list, content: str | None, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    if content is not None:
        (tmp_path / "empty" / "tokenizer.json").write_text(content)
    assert make(*good, "--out", tmp_path / "out", "--tokenizer", tmp_path / "empty") == 2
    assert "no tokenizer that loads in this folder (" in last_line(capsys)


def test_full_disk_is_one_line_and_the_run_goes_on_later(
    tmp_path: Path, good: list, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shard_pass.write_shard
    shards = 0

    def fail_at_the_third(*arguments: Any) -> Any:
        nonlocal shards
        shards += 1
        if shards == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(*arguments)

    monkeypatch.setattr(shard_pass, "write_shard", fail_at_the_third)
    assert make(*good, "--out", tmp_path / "out") == 1
    assert "the disk is full" in (line := last_line(capsys))
    assert "finished work is kept" in line
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert len(finished) == 2
    assert make(*good, "--out", tmp_path / "out") == 0
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items()), "not made again"
    assert make(*good, "--out", tmp_path / "fresh") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_each_write_that_finds_the_disk_full_is_named_and_the_run_goes_on(
    tmp_path: Path,
    tokenizer_folder: str,
    documents: list[str],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each call fails a little later than the one before, and goes on with what that has left."""
    (tmp_path / "a.txt").write_text("\n".join(documents[:60]))
    (tmp_path / "b.txt").write_bytes(b"\xff")
    source = [f"line:{tmp_path}/{name}.txt" for name in "ab"]
    good = [*source, "--tokenizer", tokenizer_folder, "--heldout-fraction", 0.1, "--on-bad-record", "skip"]
    assert make(*good, "--out", tmp_path / "fresh") == 0
    out, kinds = tmp_path / "out", set()

    def fsync(number: int) -> None:
        """Fails at the first write of every kind."""
        path = os.readlink(f"/proc/self/fd/{number}")
        kind = re.sub(r"\d+", "N", os.path.relpath(path, out)).replace("/.", "/").removesuffix(".partial")
        if kind not in kinds:
            kinds.add(kind)
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    capsys.readouterr()
    for calls in range(1, 30):
        if (code := make(*good, "--out", out)) == 0:
            break
        assert code == 1
        line = last_line(capsys)
        assert re.match(rf"write_shards: {out}/\S+: No space left on device: the disk is full", line)
        assert len(kinds) == calls
    kinds = {kind.removeprefix(".") for kind in kinds}
    assert {"skipped.jsonl", ".sources.json", "manifest.json", "train-N.tar", "token_histogram.npy"} <= kinds
    assert {"work/job.json", "work/buckets/N-N.bucket", "work/buckets/N.end"} <= kinds
    assert {"work/shards/train-N.tar.npy", "work/shards/train-N.tar.json"} <= kinds
    assert contents(out) == contents(tmp_path / "fresh")  # the last call was without an error


def test_a_fault_of_this_code_is_told_with_its_place_and_exit_code_1(
    tmp_path: Path, good: list, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_pass, "order_and_deduplicate", lambda *_: 1 // 0)
    assert make(*good, "--out", tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert "write_shards: Traceback" in errors
    assert "ZeroDivisionError" in errors


def test_a_unit_that_was_read_to_its_end_may_lack_a_chunk(tmp_path: Path, good: list, corpus: Path) -> None:
    """Whoever reads a shared file's end first may leave others' chunks unfinished when all are killed."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_shards, "make_plan", None)
        assert make(*good, "--out", out) == 1
    (bucket,) = (out / ".work" / "buckets").glob("*.bucket")
    assert len(list((out / ".work" / "buckets").glob("*.end"))) == 1
    bucket.unlink()
    assert make(*good, "--out", out) == 0
    assert make(*good, "--out", tmp_path / "fresh") == 0
    assert contents(out) == contents(tmp_path / "fresh")


# ------------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flip", r"train-000001\.tar is altered: its sha256 is not the manifest's"),
        ("cut", r"train-000001\.tar has .* bytes, the manifest says"),
        ("remove", r"train-000001\.tar is missing"),
        ("stranger", r"holds train-000099\.tar, which the manifest does not name"),
        ("histogram", "does not count the tokens of the train split"),
        ("histogram file", "token_histogram.npy is damaged .it is not an .npy file of one array.; remove"),
        ("tokenizer", "tokenizer is missing"),
        ("tokenizer file", r"out/tokenizer does not load \(.+\); remove the folder"),
        ("hostile", r"train-000001\.tar is no shard: member '/etc/x\.tokens\.npy' is not called KEY\.tokens"),
        ("counts", r"train-000001\.tar has .* documents, the manifest says"),
        ("manifest", "manifest.json does not exist; make shards with"),
        (
            "mask_id",
            r"out/manifest.json: tokenizer.mask_id is 1, but .*out/tokenizer has 4: one .* restore it",
        ),
    ],
)
def test_verify_names_what_is_wrong(
    tmp_path: Path, good: list, damage: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert make(*good, "--out", out) == 0
    shard = out / "train-000001.tar"
    if damage == "flip":
        data = bytearray(shard.read_bytes())
        data[700] ^= 1
        shard.write_bytes(data)
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-512])
    elif damage == "remove":
        shard.unlink()
    elif damage == "stranger":
        shutil.copy(shard, out / "train-000099.tar")
    elif damage == "histogram":
        np.save(out / "token_histogram.npy", np.zeros(64, dtype=np.int64))
    elif damage == "histogram file":
        (out / "token_histogram.npy").write_bytes(b"nonsense")
    elif damage == "tokenizer file":
        (out / "tokenizer" / "tokenizer.json").write_text('{"version": "1.0"}')
    elif damage == "hostile":
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("/etc/x.tokens.npy"))
        shard.write_bytes(data.getvalue())
        content = json.loads((out / "manifest.json").read_text())
        digest = hashlib.sha256(data.getvalue()).hexdigest()
        content["splits"]["train"][1] |= {"bytes": len(data.getvalue()), "sha256": digest}
        (out / "manifest.json").write_text(json.dumps(content))
    elif damage == "tokenizer":
        shutil.rmtree(out / "tokenizer")
    elif damage == "manifest":
        (out / "manifest.json").unlink()
    elif damage == "mask_id":
        content = json.loads((out / "manifest.json").read_text())
        content["tokenizer"]["mask_id"] = 1
        (out / "manifest.json").write_text(json.dumps(content))
    else:
        content = json.loads((out / "manifest.json").read_text())
        content["splits"]["train"][1]["documents"] += 1
        (out / "manifest.json").write_text(json.dumps(content))
    assert verify_shards.main([str(out)]) == 2
    assert re.search(message, last_line(capsys))


def test_verify_shows_passages(tmp_path: Path, good: list, capsys: pytest.CaptureFixture) -> None:
    assert make(*good, "--out", tmp_path / "out") == 0
    capsys.readouterr()
    assert verify_shards.main([str(tmp_path / "out"), "--passages", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"\[train-000000\.tar\] (\w+ )+", lines[0])
    assert "all as recorded" in lines[2]
    assert lines[-1] == f"manifest digest {Manifest.load(tmp_path / 'out').digest()}"


def test_what_another_host_has_written_is_not_missed(
    tmp_path: Path, good: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS: a folder's list may lack a new name for a while, and a new file is not found at first."""
    assert make(*good, "--out", tmp_path / "expected") == 0
    exists, glob, asked = Path.exists, Path.glob, set()

    def seen_late(path: Path) -> bool:
        is_new = path.suffix in (".bucket", ".end") and path not in asked
        asked.add(path)
        return exists(path) and not is_new

    monkeypatch.setattr(Path, "exists", seen_late)
    monkeypatch.setattr(
        Path, "glob", lambda path, pattern: [] if "bucket" in pattern else glob(path, pattern)
    )
    assert make(*good, "--out", tmp_path / "o") == 0
    assert Manifest.load(tmp_path / "o").digest() == Manifest.load(tmp_path / "expected").digest()


def test_a_host_that_does_not_see_the_work_folder_is_named(
    tmp_path: Path, good: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path.suffix != ".bucket" and exists(path))
    monkeypatch.setattr("data_prep.shard_format.files.SEEN_LATE_S", 0.01)
    assert make(*good, "--out", tmp_path / "o") == 2
    assert re.search(
        r"does not see \S+000000-000000.bucket, which .*all hosts have mounted", capsys.readouterr().err
    )
