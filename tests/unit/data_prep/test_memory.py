"""Documents of many megabytes: read in pieces, with the same result, in a bounded part of the memory."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from data_prep import document_encoder as encoding
from data_prep import write_shards
from data_prep.document_encoder import Encoder
from data_prep.shard_format import token_blocks
from data_prep.shard_format.manifest import Manifest, tokenizer_info
from data_prep.sources import parquet_pages, tables, texts
from data_prep.sources.long_json import long_json_text
from data_prep.sources.records import Reading, ReadOptions
from data_prep.sources.streams import DamagedFile
from data_prep.sources.texts import LongText


def rows(path: Path) -> list[tuple[str, str | None]]:
    records = [
        record
        for part in tables.parquet_parts(str(path))
        for record in tables.read_parquet(part, ReadOptions(), Reading())
    ]
    return [(r.place, None if r.payload is None else bytes(r.payload).decode()) for r in records]


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_large_pages_hold_what_arrow_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, version: str
) -> None:
    rng = random.Random(0)
    texts = ["é漢x " * rng.choice([0, 1, 5, 100]) + rng.choice([str(n), ""]) for n in range(300)]
    path = tmp_path / "a.parquet"
    for nulls, dictionary, kind in itertools.product(
        [0, 0.3], [True, False], [pa.string(), pa.large_string()]
    ):
        values = [None if rng.random() < nulls else text for text in texts]
        schema = pa.schema([("id", pa.int64()), pa.field("text", kind, nullable=nulls > 0)])
        pq.write_table(
            pa.table({"id": range(300), "text": values}, schema=schema),
            path,
            use_dictionary=dictionary,
            dictionary_pagesize_limit=4000,  # where it is full, plain pages follow
            data_page_version=version,
            compression=compression,
            row_group_size=170,
            data_page_size=500,
            write_batch_size=16,
        )
        monkeypatch.setattr(tables, "LARGE_PAGE", 1 << 26)
        expected = rows(path)
        assert [text for _, text in expected] == values
        assert expected[-1][0] == "row 300"
        monkeypatch.setattr(tables, "LARGE_PAGE", 1)
        assert rows(path) == expected


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (5, "a page's header is damaged"),
        (30, "a page ends too early"),
    ],
)
def test_damaged_large_pages_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, message: str
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"text {n} " * 50 for n in range(300)]}),
        path,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    data = bytearray(path.read_bytes())
    data[at : at + 40] = b"\xff" * 40
    path.write_bytes(data)
    monkeypatch.setattr(tables, "LARGE_PAGE", 1)
    with pytest.raises(DamagedFile, match=rf"a\.parquet is damaged.*{message}"):
        rows(path)


def test_a_page_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["long text " * 500]}), path)
    monkeypatch.setattr(tables, "LARGE_PAGE", 1)
    monkeypatch.setattr(parquet_pages, "LARGEST_PAGE", 3000)
    with pytest.raises(
        DamagedFile, match=r"a\.parquet .*: a page of 5,0\d\d bytes; write the file again with"
    ):
        rows(path)


@pytest.mark.parametrize("unit", ["x", "\n", '"', "é", "\U0001f600", "\\", "\t\u00e9\n"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_json_without_spaces_is_cut_too(monkeypatch: pytest.MonkeyPatch, unit: str, ascii_only: bool) -> None:
    """A text of base64, say: it must not become one string."""
    text = "a" + unit * 2000 + "b"
    line = json.dumps({"text": text}, ensure_ascii=ascii_only).encode()
    for size in range(100, 112):  # a pair of surrogate escapes has twelve bytes
        monkeypatch.setattr(texts, "PIECE", size)
        pieces = list(long_json_text(line, ("text",)).pieces())
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 240


def test_a_long_gap_is_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PIECE", 100)
    text = "a" + " \n" * 5000 + "b" + "\r\n" * 3000
    pieces = list(LongText(text.encode()).pieces())
    assert "".join(pieces) == text.strip().replace("\r\n", "\n")
    assert max(map(len, pieces)) <= 300


def test_a_document_of_too_many_tokens_is_a_bad_record(
    tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 20)
    monkeypatch.setattr(encoding, "MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(texts, "LONG", 30)
    monkeypatch.setattr(texts, "PIECE", 16)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    encoder = Encoder(tokenizer.backend_tokenizer.to_str(), tokenizer_info(tokenizer))
    found = list(encoder.encode(enumerate(["the model", "a " * 60, "the student"])))
    assert {document.record: document.problem for document in found} == {
        0: None,
        1: "a document of more than 50 tokens; split it",
        2: None,
    }


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".parquet"])
def test_memory_per_byte_of_a_long_document(
    tmp_path: Path, tokenizer_folder: str, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what Python and NumPy hold: the text once or twice, and two thirds of a token of two bytes per byte."""
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1 << 16)
    monkeypatch.setattr(token_blocks, "_SLICE", 1 << 16)
    monkeypatch.setattr(texts, "LONG", 1 << 16)
    monkeypatch.setattr(texts, "PIECE", 1 << 14)
    monkeypatch.setattr(tables, "LARGE_PAGE", 1 << 20)
    text, path = "a, " * 800_000, tmp_path / f"a{ending}"
    if ending == ".parquet":
        pq.write_table(pa.table({"text": [text]}), path)
    else:
        path.write_text(text if ending == ".txt" else json.dumps({"text": text}))
    arguments = ["--tokenizer", tokenizer_folder, "--out", str(tmp_path / "out"), "--heldout-fraction", "0"]
    write_shards.load_tokenizer(tokenizer_folder)
    tracemalloc.start()
    try:
        assert write_shards.main([str(path), *arguments, "--processes", "1"]) == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert Manifest.load(tmp_path / "out").splits["train"][0].tokens == 1_600_001
    assert peak < 3 * len(text), f"{peak / len(text):.2f} bytes per byte of text"
