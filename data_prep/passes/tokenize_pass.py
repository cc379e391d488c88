"""The tokenize pass: every document is read, digested and tokenised once, and put into a bucket file."""

from __future__ import annotations

import collections
import gc
import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.passes.bucket_files import document_keys, read_head, write_bucket
from data_prep.passes.document_encoder import Encoder
from data_prep.passes.job import Job
from data_prep.passes.near_duplicates import BANDS, Signatures
from data_prep.passes.placement import order_and_deduplicate
from data_prep.shard_format.errors import UserError
from data_prep.shard_format.files import new_file, until_seen, write_text
from data_prep.sources.formats import FORMATS, document_of
from data_prep.sources.records import Reading, Record, SourceFile
from data_prep.sources.resolve import Unit, chunk_bytes, make_units
from data_prep.sources.texts import BadRecord
from data_prep.workers import Worker


class TokenizePass:
    """What every process does with the sources; a data_prep.workers.Pass."""

    label, unit = "reading", "B"

    def __init__(self, job: Job) -> None:
        self._job = job
        self.claims = job.claims
        self._units = make_units(job.sources)

    @property
    def total(self) -> int:
        return sum(unit.bytes for unit in self._units)

    def run(self, worker: Worker) -> None:
        worker.progress.already_done(sum(head["stored_bytes"] for head in bucket_heads(self._job)))
        encoder = Encoder(self._job.backend, self._job.tokenizer)
        # Before anybody begins: an end mark alone does not say that the chunks before it are done.
        waiting = [unit for unit in self._units if not self._is_done(unit)]
        waiting.sort(key=lambda unit: -unit.bytes)
        gc.disable()  # parsing makes many objects, none of them in cycles
        try:
            for unit in waiting:
                if worker.claim(f"unit-{unit.number:06d}"):
                    self._read(unit, worker, encoder)
            for unit in waiting:
                if unit.shared and not self._job.end(unit).exists():
                    self._read(unit, worker, encoder)
        finally:
            gc.enable()

    def _is_done(self, unit: Unit) -> bool:
        if not self._job.end(unit).exists():
            return False
        num_chunks = int(self._job.end(unit).read_text())
        return all(self._job.bucket(unit, chunk).exists() for chunk in range(num_chunks))

    def _read(self, unit: Unit, worker: Worker, encoder: Encoder) -> None:
        """Read a unit to its end; do those of its chunks that nobody has done or claimed."""
        reader = _UnitReader(unit, self._job)
        limit = chunk_bytes(self._job.sources)
        chunk = begun = 0
        while (first := reader.next_record()) is not None:
            worker.check()
            target = self._job.bucket(unit, chunk)
            records = reader.chunk(first, limit)
            first = None  # let go of it: the next one may be as long
            if target.exists() or not worker.claim(target.name):
                collections.deque(records, maxlen=0)
            else:
                _Chunk(self._job, worker, reader, begun).write(target, encoder, records, unit.source)
            begun = reader.position()
            chunk += 1
        # All that read it to its end write the same; two at a time would be in each other's way.
        if not self._job.end(unit).exists() and worker.claim(self._job.end(unit).name):
            write_text(self._job.end(unit), str(chunk))


class _Chunk:
    """Records of a unit that become one bucket file."""

    def __init__(self, job: Job, worker: Worker, reader: _UnitReader, begun: int) -> None:
        self._options = job.options
        self._worker = worker
        self._reader = reader
        self._begun = begun
        self._bad: list[dict[str, str]] = []

    def write(self, target: Path, encoder: Encoder, records: Iterator[Record], source: int) -> None:
        digests: list[bytes] = []
        documents: list[np.ndarray] = []
        signatures = Signatures() if self._options.drop_near_duplicates else None
        bands: list[np.ndarray] = []
        num_short = num_read = 0
        position = self._begun
        for encoded in encoder.encode(self._texts(records)):
            num_read += 1
            if len(encoded.tokens) - 1 < self._options.min_tokens:
                num_short += 1
                continue
            digests.append(encoded.digest)
            documents.append(encoded.tokens)
            if signatures is not None:
                bands.append(signatures.bands(encoded.tokens[:-1]))
            if num_read % 256 == 0:
                self._worker.check()
                now = self._reader.position()
                self._worker.progress.add(now - position)
                position = now
        digest_table = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
        keys = document_keys(digest_table, self._options.seed, self._options.heldout_fraction)
        kept = order_and_deduplicate(keys, digest_table)
        end = self._reader.position()
        head = {
            "source": source,
            "stored_bytes": end - self._begun,
            "read": num_read,
            "too_short": num_short,
            "duplicates": len(keys) - len(kept),
            "bad": self._bad,
        }
        kept_documents = [documents[index] for index in kept.tolist()]
        band_table = None
        if signatures is not None:
            band_table = np.array(bands, dtype=np.uint64).reshape(-1, BANDS)[kept]
        write_bucket(target, head, keys[kept], digest_table[kept], kept_documents, band_table)
        self._worker.progress.add(end - position, num_read, sum(map(len, documents)))

    def _texts(self, records: Iterator[Record]) -> Iterator[str]:
        read_options = self._options.read_options()
        for record in records:
            file = self._reader.file
            assert file is not None
            try:
                yield document_of(record, file.format, read_options)  # no name: the next one may be as long
            except BadRecord as error:
                self._leave_out(f"{file.path}, {record.place}" if record.place else file.path, error)

    def _leave_out(self, where: str, problem: BadRecord) -> None:
        if not self._options.skip_bad_records:
            raise UserError(
                f"{where}: {problem}; mend it, or leave such records out with --on-bad-record skip"
            )
        self._bad.append({"where": where, "problem": str(problem)})


class _UnitReader:
    """A unit's records, file after file, cut into chunks of about a given size."""

    def __init__(self, unit: Unit, job: Job) -> None:
        self.file: SourceFile | None = None
        self._before = 0
        self._reading = Reading()
        self._records = self._all(unit, job)

    def _all(self, unit: Unit, job: Job) -> Iterator[Record]:
        options = job.options.read_options()
        for file in unit.files:
            self.file = file
            self._reading = Reading()
            yield from FORMATS[file.format].read(file, options, self._reading)
            self._reading = Reading()
            self._before += file.bytes

    def position(self) -> int:
        """Bytes of the stored files that are behind."""
        return self._before + self._reading.position()

    def next_record(self) -> Record | None:
        return next(self._records, None)

    def chunk(self, first: Record, limit: int) -> Iterator[Record]:
        yield first
        size = first.size
        while size < limit and (record := self.next_record()) is not None:
            size += record.size
            yield record


def made_buckets(job: Job) -> tuple[Path, ...]:
    """The bucket files of a finished pass, by the numbers of chunks: a folder that is listed may lack what another host
    has written a moment ago, and documents would be missing without a word.

    Raises:
        UserError: one of them is not seen here.
    """
    made: list[Path] = []
    for unit in make_units(job.sources):
        wait_for([job.end(unit)])
        made += [job.bucket(unit, chunk) for chunk in range(int(job.end(unit).read_text()))]
    wait_for(made)
    return tuple(made)


def wait_for(paths: Sequence[Path]) -> None:
    """Until this host sees all of these files, which others of the job have written.

    Raises:
        UserError: it does not.
    """

    def missing() -> str | None:
        return next((str(path) for path in paths if not path.exists()), None)

    if paths and (path := until_seen(missing, paths[0].parent)) is not None:
        raise UserError(
            f"{platform.node()} does not see {path}, which another process has written: --out must lie on a file "
            "system that all hosts have mounted"
        )


def bucket_heads(job: Job) -> list[dict[str, Any]]:
    """The heads of all bucket files, in the order of the inputs."""
    return [read_head(path) for path in job.bucket_paths()]


def write_skipped(path: Path, heads: list[dict[str, Any]]) -> int:
    """Name the records that were left out, one JSON object per line; no file where there is none."""
    bad = [record for head in heads for record in head["bad"]]
    if bad:
        with new_file(path) as file:
            file.writelines(json.dumps(record) + "\n" for record in bad)
    else:
        path.unlink(missing_ok=True)
    return len(bad)
