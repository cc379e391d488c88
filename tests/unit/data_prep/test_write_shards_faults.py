"""What data_prep/write_shards.py refuses, and what it goes on from: bad records, folders, full disks, late files."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from data_prep import write_shards
from data_prep.passes import shard_pass
from data_prep.passes.work_folder import locked
from data_prep.shard_format.manifest import Manifest
from tests.distributed.data_prep_runs import contents
from tests.unit.data_prep.writing import last_line, make


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


@pytest.mark.parametrize("more", [[], ["--drop-near-duplicates"]])
def test_sources_without_a_record(
    tmp_path: Path, good: list, more: list[str], capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "blank.txt").write_text("  \n\n")
    assert make(f"line:{tmp_path}/blank.txt", *good[1:], "--out", tmp_path / "out", *more) == 2
    assert last_line(capsys).startswith("write_shards: no document to write: 0 read, of which 0 have fewer")
