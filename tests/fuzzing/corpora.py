"""What data preparation reads and writes: sources, shards, their manifest and token histogram."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_prep import verify_shards
from data_prep.passes.job import Job, JobOptions
from data_prep.passes.tokenize_pass import _Chunk, _UnitReader
from data_prep.shard_format.manifest import TOKENIZER_FOLDER
from data_prep.shard_format.tokenizer_info import tokenizer_info
from data_prep.sources.resolve import make_units, resolve_sources
from tests.conftest import WORDS
from tests.fuzzing.target import Target
from tests.tiny_shards import TOKENIZER, with_histogram, write_tiny_shards
from tests.unit.finetuning.squad_tokenizers import wordpiece
from train.build import load_manifest
from train.data.shard_checks import check_shards
from train.data.shards import read_histogram, read_shard, shard_tokens

SHARDS = "shards"


def _make_shards(folder: Path) -> None:
    tokenizer = wordpiece()  # its special tokens have the ids of those in tiny shards
    manifest = replace(
        write_tiny_shards(folder / SHARDS, shards=2, documents=30), tokenizer=tokenizer_info(tokenizer)
    )
    tokenizer.save_pretrained(folder / SHARDS / TOKENIZER_FOLDER)
    counts = np.zeros(manifest.tokenizer.vocab_size, np.int64)
    for info in manifest.splits["train"]:
        counts += verify_shards.check_shard(folder / SHARDS / info.name, info, manifest)
    with_histogram(folder / SHARDS, manifest, counts)


def _read_shards(folder: Path) -> tuple[Any, ...]:
    """What a run takes from a folder of shards: tokens, histogram, special ids."""
    manifest = load_manifest(SHARDS)
    check_shards(SHARDS, manifest)
    infos = [info for split in manifest.splits.values() for info in split]
    tokens = [shard_tokens(read_shard(SHARDS, info), info, manifest.tokenizer).tobytes() for info in infos]
    return manifest.tokenizer, tokens, read_histogram(SHARDS, manifest).tobytes()


def _same_tokens_as_counted(value: Any, expected: Any, folder: Path) -> str | None:
    """Another manifest may leave a shard out, and then needs another histogram; the rest is the same."""
    if value[0] != expected[0]:
        return f"another tokenizer: {value[0]}"
    if not set(value[1]) <= set(expected[1]):
        return "other tokens"
    return None if value[2] == expected[2] else "another histogram"


def _texts() -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(12)]


def _lines_of_json(texts: list[str]) -> bytes:
    return "".join(
        json.dumps({"id": index, "text": text}) + "\n" for index, text in enumerate(texts)
    ).encode()


def _make_plain(folder: Path) -> None:
    (folder / "book.txt").write_text("\n".join(_texts()) + "\n")
    (folder / "dump.jsonl").write_bytes(_lines_of_json(_texts()))


def _make_packed(folder: Path) -> None:
    data = _lines_of_json(_texts())
    pack: dict[str, Callable[[bytes], bytes]] = {
        "gz": lambda data: gzip.compress(data, mtime=0),
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    }
    for ending, function in pack.items():
        (folder / f"dump.jsonl.{ending}").write_bytes(function(data))


def _make_parquet(folder: Path) -> None:
    pq.write_table(
        pa.table({"text": _texts(), "id": list(range(12))}), folder / "table.parquet", row_group_size=5
    )


def _read_sources(folder: Path) -> list[tuple[str, list[str]]]:
    """Every document of every file in the folder, as the first pass finds it."""
    found = []
    for path in sorted(folder.iterdir()):
        options = JobOptions((str(path),), "t", "out", txt_documents="line", max_document_mb=1)
        job = Job(options, tuple(resolve_sources([str(path)], "line")), TOKENIZER, "", "run")
        for unit in make_units(job.sources):
            reader = _UnitReader(unit, job)
            texts: list[str] = []
            while (first := reader.next_record()) is not None:
                texts += _Chunk(job, None, reader, 0)._texts(reader.chunk(first, 1 << 20))  # type: ignore[arg-type]
            found.append((path.name, texts))
    return found


def _as_the_lines_say(found: list[tuple[str, list[str]]], expected: Any, folder: Path) -> str | None:
    """Every line that is not blank is a document, or the file is refused."""
    for name, texts in found:
        lines = [line for line in (folder / name).read_bytes().split(b"\n") if line.strip()]
        said = [
            json.loads(line)["text"] if name.endswith("l") else line.decode("utf-8-sig") for line in lines
        ]
        if [text.strip(" \t\r\n\f\v\ufeff") for text in said] != [
            text.strip(" \t\r\n\f\v\ufeff") for text in texts
        ]:
            return f"{name}: other texts"
    return None


def _as_packed(found: list[tuple[str, list[str]]], expected: Any, folder: Path) -> str | None:
    """Each format has a checksum: what is there is whole."""
    whole = dict(expected)
    return next((f"{name}: other texts" for name, texts in found if texts != whole[name]), None)


def _as_arrow_reads(found: list[tuple[str, list[str]]], expected: Any, folder: Path) -> str | None:
    texts = [text for _, part in found for text in part]
    if not (folder / "table.parquet").exists():
        return "texts out of nothing" if texts else None
    theirs = pq.read_table(folder / "table.parquet", columns=["text"])["text"].to_pylist()
    return None if [text.strip() for text in theirs] == [text.strip() for text in texts] else "other texts"


def _verify(folder: Path) -> Any:
    """What verify_shards does, and the tokens that it passed."""
    manifest, _ = verify_shards.check_folder(folder / SHARDS)
    infos = [info for split in manifest.splits.values() for info in split]
    return manifest.tokenizer, [(folder / SHARDS / info.name).read_bytes() for info in infos]


TARGETS = (
    Target("shards", _make_shards, _read_shards, damaged=(f"{SHARDS}/*.tar",)),
    Target(
        "manifest",
        _make_shards,
        _read_shards,
        _same_tokens_as_counted,
        damaged=(f"{SHARDS}/manifest.json", f"{SHARDS}/{TOKENIZER_FOLDER}/*"),
    ),
    Target("histogram", _make_shards, _read_shards, damaged=(f"{SHARDS}/*.npy",)),
    Target("verify-shards", _make_shards, _verify, is_data_prep=True),
    Target("sources-plain", _make_plain, _read_sources, _as_the_lines_say, is_data_prep=True),
    Target("sources-packed", _make_packed, _read_sources, _as_packed, kinds=("bytes",), is_data_prep=True),
    Target("sources-parquet", _make_parquet, _read_sources, _as_arrow_reads, is_data_prep=True),
)
