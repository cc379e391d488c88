"""Documents up to the limit, and many of them, in a bounded part of the memory."""

from __future__ import annotations

import json
import multiprocessing
import random
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import write_shards
from data_prep.passes import document_encoder
from data_prep.shard_format import blocks
from data_prep.shard_format.manifest import Manifest
from data_prep.sources import tables, texts

LIMIT = 1_000_000  # of --max-document-mb 1


def write_source(path: Path, documents: list[str]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": documents}), path, row_group_size=2)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))
    else:
        path.write_text("\n".join(documents))


def peak_of_writing(path: Path, out: Path, arguments: Sequence[str]) -> int:
    """Bytes that Python and NumPy hold at most while shards are made of `path`."""
    document_encoder.BATCH_CHARACTERS = document_encoder.LONG = blocks._SLICE = 1 << 14
    texts.PIECE = 1 << 13
    # What the first call in a process imports, 4 MB of it, is no part of a document's cost.
    short = path.with_name(f"short{path.suffix}")
    write_source(short, ["some words"])
    assert write_shards.main([str(short), "--out", f"{out}-short", *arguments]) == 0
    tracemalloc.start()
    try:
        assert write_shards.main([str(path), "--out", str(out), *arguments]) == 0
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def process() -> Iterator[Executor]:
    """One without the threads that other tests may have left behind: what they hold would count."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".parquet"])
def test_memory_per_byte_of_the_longest_document(
    tmp_path: Path, tokenizer_folder: str, ending: str, process: Executor
) -> None:
    """Of what Python and NumPy hold: fewer than 15 bytes per byte of the limit, for any number of documents.

    With 64 MB and what the imports and the tokenizer take (300 MB), a process stays below 1.5 GB. One character
    beyond the 16-bit plane makes Python hold four bytes for each of a text.
    """
    documents = [f"\U0001f600 {number}" + "a, " * (LIMIT // 3 - 4) for number in range(10, 13)]
    assert LIMIT - 8 < len(documents[0].encode()) <= LIMIT
    path, out = tmp_path / f"a{ending}", tmp_path / "out"
    write_source(path, documents)
    arguments = ["--tokenizer", tokenizer_folder, "--heldout-fraction", "0", "--processes", "1"]
    arguments += ["--max-document-mb", "1", "--txt-documents", "line", "--shard-tokens", "1024"]
    peak = process.submit(peak_of_writing, path, out, arguments).result(timeout=300)
    assert sum(shard.documents for shard in Manifest.load(out).splits["train"]) == len(documents)
    assert peak < 15 * LIMIT, f"{peak / LIMIT:.2f} bytes per byte of the longest document"


def texts_of(path: Path, max_document_mb: int) -> list[tuple[str, str | None]]:
    options = tables.ReadOptions(max_document_mb=max_document_mb)
    records = [
        record
        for part in tables.parquet_parts(str(path))
        for record in tables.read_parquet(part, options, tables.Reading())
    ]
    return [(r.place, None if r.payload is None else bytes(r.payload).decode()) for r in records]


def test_large_rows_of_a_table_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    rng = random.Random(0)
    values = ["é漢x " * rng.randrange(40_000) if number % 7 else None for number in range(60)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": range(60), "text": values}), path, row_group_size=20)
    rows = texts_of(path, max_document_mb=1)
    assert rows == [(f"row {number + 1}", value) for number, value in enumerate(values)]
    group = pq.ParquetFile(path).metadata.row_group(0)
    options = tables.ReadOptions(max_document_mb=1)
    assert tables._batch_rows("a", group, "text", options) < 20
    assert tables._batch_rows("a", group, "text", tables.ReadOptions()) == tables.ROWS
    with pytest.raises(ValueError, match="a is damaged: it lacks the column 'body'; fetch or write it again"):
        tables._batch_rows("a", group, "body", options)


def test_pages_that_may_be_too_large_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rng = random.Random(0)
    pq.write_table(pa.table({"text": [rng.randbytes(450_000).hex() for _ in range(6)]}), path)
    with pytest.raises(
        ValueError,
        match=r"a\.parquet, row group 0: rows of 0\.9 MB on average make pages of up to 5 MB, more than 4 MB; "
        r"write the file again with fewer rows in a row group, or raise --max-document-mb",
    ):
        texts_of(path, max_document_mb=1)
    assert len(texts_of(path, max_document_mb=2)) == 6
