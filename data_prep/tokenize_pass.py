"""Pass 1: every document is read, digested and tokenised once, and spilled with the key of its place."""

from __future__ import annotations

import collections
import contextlib
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.bucket_files import document_keys, read_head, write_spill
from data_prep.document_encoder import Encoder
from data_prep.job import Job, Team
from data_prep.placement import order_and_deduplicate
from data_prep.progress import Progress
from data_prep.shard_format.errors import UserError
from data_prep.sources.records import FORMATS, Reading, Record, SourceFile
from data_prep.sources.resolve import Unit, chunk_bytes, make_units
from data_prep.sources.texts import BadRecord, Text


class Spiller:
    """One process's part of pass 1."""

    def __init__(self, job: Job, team: Team) -> None:
        self._job = job
        self._team = team
        self._units = make_units(job.sources)
        self._chunk_bytes = chunk_bytes(job.sources)
        self._encoder = Encoder(job.backend, job.tokenizer)
        total = sum(unit.bytes for unit in self._units)
        self._progress = team.progress = Progress(job.claims, team.world.rank, "reading", total, "B")

    def run(self) -> None:
        """Work until there is nothing left to claim."""
        if self._team.world.rank == 0:
            self._progress.already_done(sum(head["stored_bytes"] for head in spill_counts(self._job)))
        # Before anybody begins: an end mark alone does not say that the chunks before it are done.
        waiting = sorted((unit for unit in self._units if not self._is_done(unit)), key=_largest_first)
        gc.disable()  # parsing makes many objects, none of them in cycles
        try:
            self._work_on_all(waiting)
        finally:
            gc.enable()

    def _work_on_all(self, waiting: list[Unit]) -> None:
        for unit in waiting:
            if self._team.claim(f"unit-{unit.number:06d}") is not None:
                self._work_on(unit)
        for unit in waiting:
            if unit.shared and not self._end(unit).exists():
                self._work_on(unit)

    def _end(self, unit: Unit) -> Path:
        """Holds the unit's number of chunks; whoever has read the unit to its end writes it."""
        return self._job.spills / f"{unit.number:06d}.end"

    def _spill_path(self, unit: Unit, chunk: int) -> Path:
        return self._job.spills / f"{unit.number:06d}-{chunk:06d}.spill"

    def _is_done(self, unit: Unit) -> bool:
        try:
            num_chunks = int(self._end(unit).read_text())
        except (FileNotFoundError, ValueError):
            return False
        return all(self._spill_path(unit, chunk).exists() for chunk in range(num_chunks))

    def _work_on(self, unit: Unit) -> None:
        """Read a unit to its end; do those of its chunks that nobody has done or claimed."""
        reader = _UnitReader(unit, self._job)
        chunk = begun = 0
        while (first := reader.next_record()) is not None:
            self._team.check()
            target = self._spill_path(unit, chunk)
            records = reader.chunk(first, self._chunk_bytes)
            first = None  # let go of it: the next one may be as long
            claimed = None if target.exists() else self._team.claim(target.name)
            if claimed is None:
                collections.deque(records, maxlen=0)
            else:
                head = {"source": unit.source, "begun": begun}
                self._spill(unit, reader, records, str(claimed), head)
                os.replace(claimed, target)
            begun = reader.position()
            chunk += 1
        if not self._end(unit).exists():
            self._end(unit).write_text(str(chunk))

    def _spill(
        self, unit: Unit, reader: _UnitReader, records: Iterator[Record], path: str, head: dict[str, Any]
    ) -> None:
        digests: list[bytes] = []
        documents: list[np.ndarray] = []
        bad: list[dict[str, str]] = []
        places: dict[int, tuple[str, str]] = {}
        num_short = num_read = 0
        position = head["begun"]
        texts = self._texts(reader, records, places, bad)
        for encoded in self._encoder.encode(texts):
            file, place = places.pop(encoded.record)
            if encoded.problem is not None:
                self._bad(bad, file, place, encoded.problem)
                continue
            num_read += 1
            if len(encoded.tokens) - 1 < self._job.options.min_tokens:
                num_short += 1
                continue
            digests.append(encoded.digest)
            documents.append(encoded.tokens)
            if num_read % 256 == 0:
                self._team.check()
                now = reader.position()
                self._progress.add(now - position)
                position = now
        digest_table = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
        options = self._job.options
        keys = document_keys(digest_table, options.seed, options.heldout_fraction)
        end = reader.position()
        head = {"source": head["source"], "stored_bytes": end - head["begun"]}
        kept = order_and_deduplicate(keys, digest_table)
        duplicates = len(keys) - len(kept)
        head |= {"read": num_read, "too_short": num_short, "duplicates": duplicates, "bad": bad}
        write_spill(path, head, keys[kept], digest_table[kept], [documents[index] for index in kept.tolist()])
        self._progress.add(end - position, num_read, sum(map(len, documents)))

    def _texts(
        self,
        reader: _UnitReader,
        records: Iterator[Record],
        places: dict[int, tuple[str, str]],
        bad: list[dict[str, str]],
    ) -> Iterator[tuple[int, Text]]:
        read_options = self._job.options.read_options()
        for number, record in enumerate(records):
            assert reader.file is not None
            path = reader.file.path
            try:
                text = FORMATS[reader.file.format][1](record, read_options)
            except BadRecord as error:
                self._bad(bad, path, record.place, str(error))
                continue
            places[number] = path, record.place
            yield number, text

    def _bad(self, bad: list[dict[str, str]], file: str, place: str, problem: str) -> None:
        where = f"{file}, {place}" if place else file
        if not self._job.options.skip_bad_records:
            raise UserError(
                f"{where}: {problem}; mend it, or leave such records out with --on-bad-record skip"
            )
        bad.append({"where": where, "problem": problem})


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
            yield from FORMATS[file.format][0](file, options, self._reading)
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


def _largest_first(unit: Unit) -> tuple[int, int]:
    return -unit.bytes, unit.number


def spill_counts(job: Job) -> list[dict[str, Any]]:
    """The heads of all spills, in the order of the inputs."""
    return [read_head(path) for path in sorted(job.spills.glob("*.spill"))]


def write_skipped(path: str, heads: list[dict[str, Any]]) -> int:
    """Name the records that were left out, one JSON object per line; no file where there is none."""
    bad = [record for head in heads for record in head["bad"]]
    if bad:
        with open(path, "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in bad)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
    return len(bad)
