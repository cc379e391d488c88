"""How tests read sources, and what they pack."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable

import zstandard

from data_prep.sources.formats import FORMATS, document_of
from data_prep.sources.records import Reading, ReadOptions
from data_prep.sources.resolve import make_units, resolve_sources

TEXTS = ["First document.\nTwo lines.", "Second — with a dash.", "Third 漢字."]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def read(
    *names: str, txt_documents: str = "file", fields: tuple[str, ...] = ("text",), max_document_mb: int = 64
) -> list[str]:
    options = ReadOptions(fields, max_document_mb)
    texts = []
    for unit in make_units(resolve_sources(names, txt_documents)):
        for file in unit.files:
            reading = Reading()
            for record in FORMATS[file.format].read(file, options, reading):
                texts.append(document_of(record, file.format, options))
    return texts


def json_lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(texts)).encode()
