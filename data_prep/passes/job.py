"""What a job of data preparation is asked to do, and where it keeps its work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.passes.near_duplicates import NearDuplicates
from data_prep.shard_format.tokenizer_info import TokenizerInfo
from data_prep.sources.records import MAX_DOCUMENT_MB, ReadOptions
from data_prep.sources.resolve import Source, Unit

WORK_FOLDER = ".work"
HISTOGRAM_NAME = "token_histogram.npy"
SKIPPED_NAME = "skipped.jsonl"
NEAR_DUPLICATES_NAME = "near_duplicates.npy"
MIXTURE_OPTIONS = ("weights", "mixture_tokens")
OPTIONAL = (*MIXTURE_OPTIONS, "drop_near_duplicates")
"""Options that are recorded only where they are on."""


@dataclass(frozen=True)
class JobOptions:
    """What `write_shards` is asked to do."""

    sources: tuple[str, ...]
    tokenizer: str
    out: str
    seed: int = 0
    heldout_fraction: float = 0.01
    """Of all documents; which ones depends on their digests alone."""
    min_tokens: int = 8
    """Documents with fewer are dropped."""
    shard_tokens: int = 4_000_000
    txt_documents: str = "file"
    text_fields: tuple[str, ...] = ("text",)
    skip_bad_records: bool = False
    max_document_mb: int = MAX_DOCUMENT_MB
    weights: tuple[float, ...] = ()
    """Of the sources in a mixture; empty: every document once."""
    mixture_tokens: int | None = None
    """Of the training shards of a mixture; None: as many as use every document."""
    drop_near_duplicates: bool = False

    def recorded(self) -> dict[str, Any]:
        """What the shards' bytes depend on, for the manifest; not where they lie, nor who made them."""
        recorded = asdict(self)
        for name in ("sources", "tokenizer", "out"):
            del recorded[name]
        if not self.skip_bad_records or self.max_document_mb == MAX_DOCUMENT_MB:
            del recorded["max_document_mb"]  # it decides whether the run ends, not what is written
        for name in OPTIONAL:
            if not recorded[name]:
                del recorded[name]
        return recorded

    def read_options(self) -> ReadOptions:
        return ReadOptions(self.text_fields, self.max_document_mb)


@dataclass(frozen=True)
class Job:
    """What every process knows, once rank 0 has looked at the inputs."""

    options: JobOptions
    sources: tuple[Source, ...]
    tokenizer: TokenizerInfo
    backend: str
    run: str
    made: tuple[Path, ...] | None = None
    """All bucket files, once there are all."""
    near: NearDuplicates | None = None
    """Once they were looked for."""

    @property
    def work(self) -> Path:
        return Path(self.options.out, WORK_FOLDER)

    @property
    def buckets(self) -> Path:
        return self.work / "buckets"

    def bucket(self, unit: Unit, chunk: int) -> Path:
        return self.buckets / f"{unit.number:06d}-{chunk:06d}.bucket"

    def end(self, unit: Unit) -> Path:
        """Holds the unit's number of chunks; whoever has read the unit to its end writes it."""
        return self.buckets / f"{unit.number:06d}.end"

    def bucket_paths(self) -> list[Path]:
        """The finished bucket files, in the order of the inputs."""
        return sorted(self.buckets.glob("*.bucket")) if self.made is None else list(self.made)

    @property
    def records(self) -> Path:
        return self.work / "shards"

    @property
    def claims(self) -> Path:
        return self.work / self.run


DESCRIBED = ("source", "kind", "files", "bytes")


def describe_sources(sources: Sequence[Source]) -> list[dict[str, Any]]:
    return [
        {
            "source": source.name,
            "kind": source.kind,
            "files": len({file.path for file in source.files}),
            "bytes": sum(file.bytes for file in source.files),
        }
        for source in sources
    ]
