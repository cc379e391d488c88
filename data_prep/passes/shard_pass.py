"""The shard pass: each shard is gathered from the bucket files, put in order and written; then the manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.passes.bucket_files import Bucket, open_bucket
from data_prep.passes.chosen_heldout import chosen_rows, left_for_training
from data_prep.passes.job import HISTOGRAM_NAME, SKIPPED_NAME, Job, describe_sources
from data_prep.passes.mixture import SourcedDocuments, plan_mixture, shuffled
from data_prep.passes.near_duplicates import dropped_masks
from data_prep.passes.placement import (
    TRAIN_END,
    Documents,
    Plan,
    ShardPlan,
    order_and_deduplicate,
    plan_shards,
)
from data_prep.passes.tokenize_pass import bucket_heads, wait_for, write_skipped
from data_prep.passes.work_folder import keep_records
from data_prep.shard_format.blocks import blocks_of, count_tokens, write_shard
from data_prep.shard_format.errors import UserError
from data_prep.shard_format.files import new_file, new_folder, write_array, write_text
from data_prep.shard_format.manifest import SPLITS, TOKENIZER_FOLDER, Manifest, ShardInfo
from data_prep.workers import Worker

DOCUMENTS_IN_MEMORY = 4_000_000  # of the plan: 40 bytes each, and as much again to sort them


def make_plan(job: Job) -> Plan:
    """Decide the shards from the keys, digests and lengths in the bucket files; on rank 0.

    Raises:
        UserError: there is nothing to write.
    """
    heads = bucket_heads(job)
    total = sum(head["documents"] for head in heads)
    if total == 0:
        read = sum(head["read"] for head in heads)
        short = sum(head["too_short"] for head in heads)
        raise UserError(
            f"no document to write: {read:,} read, of which {short:,} have fewer than "
            f"{job.options.min_tokens} tokens (--min-tokens); sources: {' '.join(job.options.sources)}"
        )
    num_ranges = -(-total // DOCUMENTS_IN_MEMORY)
    # Keys are uniform in each split's half, so ranges of keys are ranges of documents.
    bounds = [half + (1 << 63) * part // num_ranges for half in (0, 1 << 63) for part in range(num_ranges)]
    bounds.append(1 << 64)

    def read_parts() -> Iterator[Documents]:
        for low, high in pairwise(bounds):
            keys, digests, lengths, _ = _documents(job, low, high)
            yield keys, digests, lengths

    plan = plan_shards(read_parts, job.options.shard_tokens, job.options.heldout_fraction)
    if job.options.weights:
        train_bounds = [bound for bound in bounds if bound <= TRAIN_END]
        plan = _mixed(job, plan, train_bounds)
    if not any(shard.split == "train" for shard in plan.shards):
        raise UserError(
            f"all {plan.documents:,} documents fall to the held-out split; lower --heldout-fraction "
            f"{job.options.heldout_fraction} or add documents"
        )
    return plan


def _mixed(job: Job, plan: Plan, bounds: Sequence[int]) -> Plan:
    """The plan with training shards that hold the sources in their shares; what is held out stays, each once."""

    def read_parts() -> Iterator[SourcedDocuments]:
        for low, high in pairwise(bounds):
            keys, digests, lengths, owners = _documents(job, low, high)
            # Of a document in several sources the first one's copy is kept: the bucket files are in their order.
            kept = order_and_deduplicate(keys, digests)
            left, lengths = left_for_training(
                plan.pieces, kept.astype(np.uint64), digests[kept], lengths[kept]
            )
            index = left.astype(np.int64)
            yield owners[index], keys[index], lengths

    options = job.options
    mixture = plan_mixture(
        read_parts, options.sources, options.weights, options.shard_tokens, options.mixture_tokens
    )
    heldout = tuple(shard for shard in plan.shards if shard.split == "heldout")
    tokens = sum(share.tokens - share.own_tokens for share in mixture.shares) + plan.tokens
    return replace(plan, shards=(*mixture.shards, *heldout), tokens=tokens, shares=mixture.shares)


def _documents(job: Job, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Keys, digests, lengths and sources of the documents between two keys, without near-duplicates."""
    counts = [head["documents"] for head in bucket_heads(job)]
    columns = []
    # One at a time: a bucket that is open keeps a file open, and there may be thousands.
    for path, dropped in zip(job.bucket_paths(), dropped_masks(job.near, counts), strict=True):
        bucket = open_bucket(path)
        part = bucket.between(low, high)
        kept = ~dropped[part]
        keys = bucket.keys[part][kept]
        source = np.full(len(keys), bucket.head["source"])
        columns.append((keys, bucket.digests[part][kept], _lengths(bucket, part)[kept], source))
    keys, digests, lengths, sources = (np.concatenate(column) for column in zip(*columns, strict=True))
    return keys, digests, lengths, sources


def _lengths(bucket: Bucket, part: slice) -> np.ndarray:
    ends = bucket.ends[part].astype(np.int64)
    before = int(bucket.ends[part.start - 1]) if part.start else 0
    return np.diff(ends, prepend=before)


class ShardPass:
    """What every process does with the bucket files; a data_prep.workers.Pass."""

    label, unit = "writing", " tokens"

    def __init__(self, job: Job, plan: Plan) -> None:
        self._job = job
        self._plan = plan
        self.claims = job.claims

    @property
    def total(self) -> int:
        return self._plan.tokens

    def run(self, worker: Worker) -> None:
        wait_for(self._job.bucket_paths())
        if self._job.near is not None:
            wait_for([self._job.near.path])
        for shard in self._plan.shards:
            worker.check()
            if (info := finished(self._job, shard)) is not None:
                worker.progress.already_done(info.tokens)
            elif worker.claim(shard.name):
                made = self._write(shard)
                worker.progress.add(made.tokens, made.documents, made.tokens)

    def _write(self, shard: ShardPlan) -> ShardInfo:
        documents = (
            self._mixed(shard) if shard.ranges else self._gather(shard.split, shard.low, shard.high)[1]
        )
        with new_file(Path(self._job.options.out, shard.name), binary=True) as file:
            hashed = _Hashed(file)
            num_documents, num_tokens = write_shard(
                hashed,  # type: ignore[arg-type]
                shard.name.removesuffix(".tar"),
                documents,
            )
            info = ShardInfo(shard.name, hashed.size, hashed.sha256.hexdigest(), num_documents, num_tokens)
            if shard.split == "train":
                counts = np.zeros(self._job.tokenizer.vocab_size, dtype=np.int64)
                for block in blocks_of(documents):  # one by one, each would cost a pass over the vocabulary
                    count_tokens(counts, np.concatenate(block) if len(block) > 1 else block[0])
                write_array(self._job.records / f"{shard.name}.npy", counts.astype(np.uint32))
            # Before the shard takes its place: a shard without a record would be made again.
            write_text(self._job.records / f"{shard.name}.json", json.dumps(asdict(info)))
        return info

    def _mixed(self, shard: ShardPlan) -> list[np.ndarray]:
        """The documents of all sources' stretches, at random places."""
        places: list[np.ndarray] = []
        documents: list[np.ndarray] = []
        for part in shard.ranges:
            keys, found = self._gather(shard.split, part.low, part.high, part.source)
            places.append(shuffled(keys, part.copy))
            documents += found
        return [documents[index] for index in np.argsort(np.concatenate(places), kind="stable").tolist()]

    def _gather(
        self, split: str, low: int, high: int, source: int | None = None
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Keys and tokens of the documents between two keys, of one source or of all, each once, in order."""
        paths = self._job.bucket_paths()
        found, parts, sources, totals = [], [], [], []
        for path in paths:  # one at a time, and copies: see _documents
            bucket = open_bucket(path)
            part = bucket.between(low, high)
            found.append((np.array(bucket.keys[part]), np.array(bucket.digests[part])))
            parts.append(part)
            sources.append(bucket.head["source"])
            totals.append(len(bucket.keys))
        keys, digests = (np.concatenate(column) for column in zip(*found, strict=True))
        order = order_and_deduplicate(keys, digests)
        if self._job.near is not None:
            masks = zip(dropped_masks(self._job.near, totals), parts, strict=True)
            order = order[~np.concatenate([mask[part] for mask, part in masks])[order]]
        if source is not None:
            counts = [part.stop - part.start for part in parts]
            owners = np.repeat(sources, counts)
            order = order[owners[order] == source]
        pieces = self._plan.pieces
        if pieces and split == "heldout":
            order = order[chosen_rows(pieces, digests[order])]
        # Other copies of a document stay unread: its shard may be where a thousand of them meet.
        kept = np.sort(order)
        documents: dict[int, np.ndarray] = {}
        before = 0
        for path, part in zip(paths, parts, strict=True):
            count = part.stop - part.start
            first, last = np.searchsorted(kept, (before, before + count))
            if first < last:
                bucket = open_bucket(path)
                ends = bucket.ends[part]
                starts = ends - _lengths(bucket, part).astype(np.uint64)
                for index in kept[first:last].tolist():
                    start, end = int(starts[index - before]), int(ends[index - before])
                    documents[index] = np.array(bucket.tokens[start:end])
            before += count
        ordered = [(pieces.get(digests[index].tobytes()), index) for index in order.tolist()]
        if pieces and split == "heldout":
            return keys[order], [documents[index][cut:] for cut, index in ordered]
        left = [(cut, index) for cut, index in ordered if cut != 0]
        # What stays of a document gets the separator that went with its end.
        return keys[[index for _, index in left]], [
            documents[index] if cut is None else np.append(documents[index][:cut], documents[index][-1:])
            for cut, index in left
        ]


class _Hashed:
    """A file that is written once, front to back, and its digest."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        self.sha256.update(data)
        self.size += len(data)
        self._file.write(data)


def finished(job: Job, shard: ShardPlan) -> ShardInfo | None:
    """The record of a shard that is already in place."""
    try:
        info = ShardInfo(**json.loads((job.records / f"{shard.name}.json").read_text()))
        size = os.path.getsize(Path(job.options.out, shard.name))
    except FileNotFoundError:
        return None
    return info if info.bytes == size else None


def _in_mixture(plan: Plan, source: int) -> dict[str, Any]:
    """What the manifest says of a source's share of the training shards; nothing without a mixture."""
    if not plan.shares:
        return {}
    share = plan.shares[source]
    return {
        "weight": round(share.weight, 6),
        "train_tokens": share.tokens,
        "train_documents": share.documents,
        "epochs": round(share.epochs, 4),
    }


def finish(job: Job, plan: Plan, save_tokenizer: Any) -> Manifest:
    """Write what lies beside the shards, the manifest last, and remove the work folder; on rank 0."""
    out = Path(job.options.out)
    histogram = np.zeros(job.tokenizer.vocab_size, dtype=np.int64)
    splits: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
    wait_for([out / shard.name for shard in plan.shards])
    wait_for([job.records / f"{shard.name}.json" for shard in plan.shards])
    for shard in plan.shards:
        info = finished(job, shard)
        assert info is not None, shard.name
        splits[shard.split].append(info)
        if shard.split == "train":
            histogram += np.load(job.records / f"{shard.name}.npy")
    write_array(out / HISTOGRAM_NAME, histogram)
    with new_folder(out / TOKENIZER_FOLDER) as folder:
        save_tokenizer(folder)
    heads = bucket_heads(job)
    read = [0] * len(job.sources)
    for head in heads:
        read[head["source"]] += head["read"]
    num_bad = write_skipped(out / SKIPPED_NAME, heads)
    described = describe_sources(job.sources)
    manifest = Manifest(
        tokenizer=job.tokenizer,
        splits={split: tuple(infos) for split, infos in splits.items()},
        token_histogram=HISTOGRAM_NAME,
        token_histogram_sha256=hashlib.sha256((out / HISTOGRAM_NAME).read_bytes()).hexdigest(),
        sources=tuple(
            {**source, "documents": read[index], **_in_mixture(plan, index)}
            for index, source in enumerate(described)
        ),
        options=json.loads(json.dumps(job.options.recorded())),
        skipped={
            "duplicates": plan.duplicates
            + sum(head["duplicates"] for head in heads)
            + (job.near.copies if job.near else 0),
            "too_short": sum(head["too_short"] for head in heads),
            "bad_records": num_bad,
            **({"near_duplicates": job.near.documents} if job.near else {}),
            **({"beyond_the_mixture": sum(share.unused for share in plan.shares)} if plan.shares else {}),
        },
    )
    keep_records(out)
    manifest.save(out)
    shutil.rmtree(job.work, ignore_errors=True)
    return manifest
