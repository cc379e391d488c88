"""A second call into the same folder: what counts as the same inputs, and which other options go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from data_prep import write_shards
from data_prep.passes import source_files, work_folder
from data_prep.shard_format.errors import UserError
from data_prep.sources.resolve import resolve_sources
from tests.distributed.data_prep_runs import contents
from tests.unit.data_prep.writing import make


class Corpus:
    """A folder of texts, and write_shards on it with a shard folder beside it."""

    def __init__(self, folder: Path, tokenizer: str, documents: list[str]) -> None:
        self.texts, self.out = folder / "texts", folder / "out"
        self.texts.mkdir()
        self.first, self.second = self.texts / "1.jsonl", self.texts / "2.jsonl"
        for path, part in ((self.first, documents[:150]), (self.second, documents[150:])):
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        self._options = ["--tokenizer", tokenizer, "--heldout-fraction", 0.1, "--shard-tokens", 3000]

    def make(self, *more: Any, source: Any = None, out: Path | None = None) -> int:
        return make(source or self.texts, *self._options, "--out", out or self.out, *more)

    def tokenize(self, *more: Any, source: Any = None) -> dict[str, int]:
        """A run that ends when every chunk is there, before any shard; the chunks that it leaves."""
        seen: dict[str, int] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(write_shards, "make_plan", lambda job: seen.update(self.buckets()) or 1 // 0)
            assert self.make(*more, source=source) == 1
        return seen

    def buckets(self) -> dict[str, int]:
        return {
            path.name: path.stat().st_mtime_ns for path in (self.out / ".work" / "buckets").glob("*.bucket")
        }


@pytest.fixture
def corpus(
    tmp_path: Path, tokenizer_folder: str, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> Corpus:
    # Each file is a unit of its own, so that one may be finished where the other has a fault.
    monkeypatch.setattr("data_prep.sources.resolve.chunk_bytes", lambda sources: 1)
    return Corpus(tmp_path, tokenizer_folder, documents)


def edit(path: Path, old: str, new: str) -> None:
    """In place, as sed -i does it: another modification time."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))


def test_a_source_that_was_edited_at_equal_size_is_named(
    corpus: Corpus, capsys: pytest.CaptureFixture
) -> None:
    assert corpus.make() == 0
    made = contents(corpus.out)
    for path in (corpus.first, corpus.second):  # as a copy or a touch
        os.utime(path, (1, 1))
    capsys.readouterr()
    assert corpus.make() == 0
    assert "complete already" in capsys.readouterr().out
    edit(corpus.second, "model", "MODEL")
    assert corpus.make() == 2
    message = rf"inputs that have changed since \({corpus.second} has other contents\); choose another --out, or remove"
    assert re.search(message, capsys.readouterr().err)
    edit(corpus.second, "MODEL", "model")
    assert corpus.make() == 0
    corpus.second.rename(corpus.texts / "3.jsonl")
    assert corpus.make() == 2
    assert re.search(r"3\.jsonl is new; .*2\.jsonl is gone", capsys.readouterr().err)
    assert contents(corpus.out) == made


def test_of_a_large_file_samples_are_compared_which_is_said(
    corpus: Corpus, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_files, "SAMPLE", 16)
    assert corpus.make() == 0
    os.utime(corpus.first, (1, 1))
    capsys.readouterr()
    assert corpus.make() == 0
    assert f"{corpus.first}: only the modification time is new" in capsys.readouterr().out
    assert len(corpus.first.read_bytes()) > 16 * 64
    for place in (0, -1):
        data = bytearray(whole := corpus.first.read_bytes())
        data[place] ^= 1
        corpus.first.write_bytes(data)
        assert corpus.make() == 2
        assert "1.jsonl has other contents" in capsys.readouterr().err
        corpus.first.write_bytes(whole)


def test_older_shards_are_compared_by_size_which_is_said(
    corpus: Corpus, capsys: pytest.CaptureFixture
) -> None:
    assert corpus.make() == 0
    (corpus.out / ".sources.json").unlink()
    assert corpus.make() == 0
    assert "the sources were compared by name and size alone" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["texts/", "./texts", "texts//", "absolute"])
def test_another_way_to_write_a_source_is_the_same(
    corpus: Corpus, way: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpus.texts.parent)
    assert corpus.make(source="texts") == 0
    assert corpus.make(source=corpus.texts if way == "absolute" else way) == 0
    assert "complete already" in capsys.readouterr().out


def test_a_link_before_two_dots_leads_to_another_file(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree("texts", "d/texts")
    Path("d/e").mkdir()
    Path("link").symlink_to("d/e")
    for plain in ("texts", "./texts/", "d/../texts"):  # as they were always recorded
        assert list(source_files.describe_files(resolve_sources([plain]))) == [
            "texts/1.jsonl",
            "texts/2.jsonl",
        ]
    assert corpus.make(source="link/../texts") == 0
    assert corpus.make(source="link/../texts") == 0
    assert "complete already" in capsys.readouterr().out
    edit(Path("d/texts/2.jsonl"), "model", "MODEL")
    assert corpus.make(source="link/../texts") == 2
    assert "/d/texts/2.jsonl has other contents" in capsys.readouterr().err


def test_a_remedy_that_a_message_names_goes_on_with_the_finished_work(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with corpus.second.open("a") as file:
        file.write(
            '{"body": "a document whose text has another name than the others have it"}\n{"text": 3}\n'
        )
    assert corpus.make() == 2
    assert "no text field 'text'; the fields are 'body' (choose with --text-field)" in capsys.readouterr().err
    finished = corpus.buckets()
    assert len(finished) == 1
    assert corpus.make("--text-field", "text,body") == 2
    assert "or leave such records out with --on-bad-record skip" in capsys.readouterr().err
    assert corpus.buckets() == finished
    remedies = ["--text-field", "text,body", "--on-bad-record", "skip"]
    assert finished.items() < corpus.tokenize(*remedies).items(), "not made again"
    assert corpus.make(*remedies) == 0
    assert corpus.make(*remedies, out=tmp_path / "fresh") == 0
    assert contents(corpus.out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("much", [False, True])
def test_other_options_start_over_unless_much_work_is_lost(
    corpus: Corpus, tmp_path: Path, much: bool, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if much:
        monkeypatch.setattr(work_folder, "RESTART_LIMIT_BYTES", 100)
    with corpus.second.open("a") as file:
        file.write("nonsense\n")
    assert corpus.make() == 2
    finished = corpus.buckets()
    other = ["--seed", 7, "--on-bad-record", "skip"]
    capsys.readouterr()
    assert corpus.make(*other) == (2 if much else 0)
    printed = capsys.readouterr()
    if much:
        assert "was made with seed 0 instead of 7; skip_bad_records False instead of True" in printed.err
        assert corpus.buckets() == finished
        return
    assert "the run that is unfinished here had other options or inputs: starting over" in printed.out
    assert corpus.make(*other, out=tmp_path / "fresh") == 0
    assert contents(corpus.out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("change", ["touch", "edit"])
def test_an_unfinished_run_goes_on_after_a_touch_and_not_after_an_edit(
    corpus: Corpus, change: str, capsys: pytest.CaptureFixture
) -> None:
    before = corpus.tokenize()
    assert len(before) == 2
    os.utime(corpus.first, (1, 1))
    if change == "edit":
        edit(corpus.first, "model", "large")
    capsys.readouterr()
    after = corpus.tokenize()
    assert (after == before) == (change == "touch")
    if change == "edit":
        printed = capsys.readouterr().out
        assert f"the inputs have changed since the run that is unfinished here ({corpus.first} has" in printed


@pytest.mark.parametrize("older", [False, True])
def test_of_a_hub_source_an_older_run_starts_over(
    corpus: Corpus, tmp_path: Path, older: bool, capsys: pytest.CaptureFixture
) -> None:
    """Its units were others, and the numbers of its bucket files stand for other rows."""
    hub = f"hub:{corpus.texts}"
    before = corpus.tokenize(source=hub)
    assert len(before) == 2
    journal = corpus.out / ".work" / "job.json"
    if older:
        begun = json.loads(journal.read_text())
        del begun["units"]
        journal.write_text(json.dumps(begun))
    seen = corpus.tokenize(source=hub)
    assert ("is of an older version: starting over" in capsys.readouterr().out) == older
    assert (seen != before) == older
    assert corpus.make(source=hub) == 0
    assert corpus.make(source=hub, out=tmp_path / "fresh") == 0
    assert contents(corpus.out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{}",
        '{"options": {}, "tokenizer": "", "sources": 3}',
        '{"options": {}, "tokenizer": "", "sources": [], "files": {"a.txt": 5}}',
    ],
)
def test_a_damaged_journal_is_named(corpus: Corpus, text: str, capsys: pytest.CaptureFixture) -> None:
    (corpus.out / ".work").mkdir(parents=True)
    (corpus.out / ".work" / "job.json").write_text(text)
    assert corpus.make() == 2
    assert re.search(r"job\.json is damaged .*; remove .*out to start over", capsys.readouterr().err)


@pytest.mark.parametrize("record", [5, [1], ["5", 1, "ab"], None])
def test_damaged_records_of_sources_are_named(tmp_path: Path, record: Any) -> None:
    (tmp_path / source_files.RECORD_NAME).write_text(json.dumps({"a.txt": record}))
    with pytest.raises(UserError, match=r"\.sources\.json is damaged \(.*\); remove it, and the sources of"):
        source_files.kept_records(tmp_path)


@pytest.mark.parametrize("folder_missing", [False, True])
def test_a_run_killed_at_its_end_starts_over_where_its_inputs_changed(
    corpus: Corpus, tmp_path: Path, folder_missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the tokenizer's folder is written; or again, while what it has made is removed."""

    def killed(tokenizer: Any, folder: Path) -> None:
        (folder / "tokenizer.json").touch()
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(write_shards, "save_tokenizer", killed)
        with pytest.raises(SystemExit):
            corpus.make()
    (corpus.out / ".tokenizer.partial").mkdir()  # as kill -9 leaves it
    if folder_missing:
        shutil.rmtree(corpus.out / ".work" / "buckets")
    edit(corpus.second, "model", "MODEL")
    assert corpus.make() == 0
    assert corpus.make(out=tmp_path / "fresh") == 0
    assert contents(corpus.out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("way", ["itself", "in a folder", "by a glob", "socket", "device"])
def test_what_is_no_file_is_refused_by_name(tmp_path: Path, way: str) -> None:
    """Opening a FIFO would wait for ever for someone who writes into it."""
    path = tmp_path / "a.txt"
    if way == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif way == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)
    name = {"in a folder": str(tmp_path), "by a glob": f"{tmp_path}/*.txt"}.get(way, str(path))
    kind = {"socket": "a socket", "device": "a device"}.get(way, r"a FIFO \(named pipe\)")
    with pytest.raises(
        ValueError, match=rf"a\.txt: is {kind}, not a file; copy what comes from it into a file"
    ):
        resolve_sources([name])
