"""Shards to batches on one process: tokens/s, first batches, memory and readings.

Three readers of the same documents are alternated, and each cuts [CLS] ... [SEP] windows of shuffled
documents into batches of int32 tensors: this project's loader; a stock webdataset pipeline on the same shards;
and a stock webdataset pipeline on tars with one document per sample, the usual layout. Without --shards
random documents with the lengths of an encyclopedia's are used. Figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset

from data_prep.passes.job import HISTOGRAM_NAME
from data_prep.shard_format.blocks import write_shard
from data_prep.shard_format.files import write_json
from data_prep.shard_format.manifest import Manifest, ShardInfo, shard_url
from data_prep.shard_format.tokenizer_info import TokenizerInfo
from launch.benchmarks import options
from launch.common.machine import hardware
from train.config_sections.data import DataConfig
from train.data.loader import BatchLoader
from train.data.order import fitting_world_sizes
from train.data.shards import read_shard, shard_tokens

H200_TOKENS_PER_S = 1e6  # about what one H200 trains on at BERT-base size
DOCUMENTS_PER_SAMPLE_TAR = 20_000
LATE_STEP = 10_000
SEED = 0
LANES = DataConfig().lanes
TOKENIZER = TokenizerInfo("random", 30_522, 0, 100, 101, 102, 103, (0, 100, 101, 102, 103))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", help="folder of shards (default: random ones are made)")
    parser.add_argument("--sequence-length", type=options.at_least_1, default=512)
    parser.add_argument("--global-batch-size", type=options.at_least_1, default=4096)
    parser.add_argument("--micro-batch-size", type=options.at_least_1, default=32)
    parser.add_argument(
        "--rounds", type=options.at_least_1, default=5, help="times that everything is repeated (default 5)"
    )
    parser.add_argument(
        "--seconds", type=options.seconds, default=4.0, help="of reading per reader and round (default 4)"
    )
    parser.add_argument(
        "--json", type=options.new_file, metavar="FILE", help="write the figures there as well"
    )


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shards = args.shards or random_shards(Path(folder, "shards"), TOKENIZER)
        figures = measure(args, shards, Path(folder))
    _print(figures)
    if args.json:
        write_json(args.json, figures)
    return 0


def measure(args: argparse.Namespace, shards: str, folder: Path) -> dict[str, Any]:
    """All figures, by name; units are the names' suffixes."""
    manifest = Manifest.load(shards)
    epoch_cost = _epoch_cost(args, shards, manifest)  # first, while the process's memory is untouched
    per_document = _one_document_per_sample(shards, manifest, folder)
    stock_shards = [shard_url(shards, shard.name) for shard in manifest.splits["train"]]
    separator, length, rows = manifest.tokenizer.sep_id, args.sequence_length, args.micro_batch_size
    readers: dict[str, Callable[[], Iterable[torch.Tensor]]] = {
        "this loader": lambda: (
            batch.input_ids for batch in _loader(args, shards, manifest).batches(0, 10**9)
        ),
        "stock webdataset, the same shards": lambda: stock(
            stock_shards, manifest.tokenizer, length, rows, separator
        ),
        "stock webdataset, a document per sample": lambda: stock(
            [per_document], manifest.tokenizer, length, rows, None
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(args.rounds):
        for name, open_reader in readers.items():
            rates[name].append(_tokens_per_s(open_reader, args.seconds))
    return {
        "shards": len(stock_shards),
        "million_tokens": sum(shard.tokens for shard in manifest.splits["train"]) / 1e6,
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "first_batch": _first_batches(args, shards),
        **epoch_cost,
        "sequence_length": length,
        "global_batch_size": args.global_batch_size,
        "micro_batch_size": rows,
        "rounds": args.rounds,
        "machine": hardware(),
        "versions": f"torch {torch.__version__}, numpy {np.__version__}, webdataset {webdataset.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }


def stock(
    urls: list[str], tokenizer: TokenizerInfo, length: int, rows: int, separator: int | None
) -> Iterator[torch.Tensor]:
    """A webdataset pipeline as its documentation builds them; it starts again at its end.

    Args:
        separator: splits a sample into documents; None where a sample is one document.
    """

    def documents(samples: Iterable[tuple[np.ndarray]]) -> Iterator[np.ndarray]:
        for (tokens,) in samples:
            if separator is None:
                yield tokens
            else:
                yield from np.split(tokens, np.flatnonzero(tokens == separator)[:-1] + 1)

    def windows(shuffled: Iterable[np.ndarray]) -> Iterator[torch.Tensor]:
        held: np.ndarray = np.zeros(0, dtype=np.int32)
        for document in shuffled:
            held = np.concatenate([held, document])
            while len(held) >= length - 2:
                content, held = held[: length - 2], held[length - 2 :]
                framed = np.concatenate([[tokenizer.cls_id], content, [tokenizer.sep_id]])
                yield torch.from_numpy(framed.astype(np.int32))

    pipeline = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=SEED)
        .decode()
        .to_tuple("tokens.npy")
        .compose(documents)
        .shuffle(1000)
        .compose(windows)
        .shuffle(1000)
        .batched(rows, collation_fn=torch.stack, partial=False)
    )
    while True:
        yield from pipeline


def _loader(args: argparse.Namespace, shards: str, manifest: Manifest, **options: Any) -> _CountingLoader:
    return _CountingLoader(
        shards,
        manifest,
        sequence_length=args.sequence_length,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        lanes=LANES,
        seed=SEED,
        **options,
    )


class _CountingLoader(BatchLoader):
    """Counts the shards it reads."""

    num_readings = 0

    def _prepare(self, key: tuple[int, int]) -> Any:
        self.num_readings += 1
        return super()._prepare(key)


def _tokens_per_s(open_reader: Callable[[], Iterable[torch.Tensor]], seconds: float) -> float:
    """Rate from the start of the reader on, its first batch included."""
    tokens, start = 0, time.perf_counter()
    for batch in open_reader():
        tokens += batch.numel()
        if time.perf_counter() - start > seconds:
            break
    return tokens / (time.perf_counter() - start)


def _first_batches(args: argparse.Namespace, shards: str) -> dict[str, dict[str, float]]:
    """Seconds from nothing (manifest unread) to a rank's first micro batch and to its first whole step.

    Medians over the rounds; round i starts i steps later, because where a step's windows lie varies.
    """
    sizes = fitting_world_sizes(args.global_batch_size, LANES, micro_batch_size=args.micro_batch_size)
    places = [(world, step) for world in (1, 8) if world in sizes for step in (0, LATE_STEP)]
    times: dict[tuple[int, int], list[tuple[float, float]]] = {place: [] for place in places}
    for offset in range(2 * args.rounds):
        for (world, step), seen in times.items():
            start = time.perf_counter()
            loader = _loader(args, shards, Manifest.load(shards), world_size=world)
            batches = loader.batches(step + offset, step + offset + 100)
            next(batches)
            first = time.perf_counter() - start
            for _ in itertools.islice(batches, args.global_batch_size // args.micro_batch_size // world - 1):
                pass
            seen.append((first, time.perf_counter() - start))
            del batches
    return {
        f"1 of {world} ranks, step {step}": {
            "first_micro_batch_s": statistics.median(first for first, _ in seen),
            "first_step_s": statistics.median(whole for _, whole in seen),
        }
        for (world, step), seen in times.items()
    }


def _epoch_cost(args: argparse.Namespace, shards: str, manifest: Manifest) -> dict[str, float]:
    """One epoch and the start of the next on a single rank: its memory, and how often a shard is read."""
    process = psutil.Process()
    before = peak = process.memory_info().rss
    loader = _loader(args, shards, manifest)
    for number, _ in enumerate(loader.batches(0, loader.steps_per_epoch)):
        if number % 16 == 0:
            peak = max(peak, process.memory_info().rss)
    return {
        "readings_per_shard_and_epoch": loader.num_readings / len(manifest.splits["train"]),
        "peak_memory_mib": (peak - before) / 2**20,
    }


def _one_document_per_sample(shards: str, manifest: Manifest, folder: Path) -> str:
    """A tar of the first documents, one in each sample; its path."""
    path = str(folder / "documents.tar")
    written = 0
    with webdataset.TarWriter(path, mtime=0) as writer:
        for shard in manifest.splits["train"]:
            tokens = shard_tokens(read_shard(shards, shard), shard, manifest.tokenizer)
            ends = np.flatnonzero(tokens == manifest.tokenizer.sep_id) + 1
            for document in np.split(tokens, ends[:-1]):
                writer.write({"__key__": f"{written:09d}", "tokens.npy": document})
                written += 1
                if written == DOCUMENTS_PER_SAMPLE_TAR:
                    return path
    return path


def random_shards(folder: Path, tokenizer: TokenizerInfo, shards: int = 8, tokens: int = 4_000_000) -> str:
    """Shards of random tokens in documents of about 250 tokens (log-normal); `tokens` in each."""
    folder.mkdir()
    rng = np.random.default_rng(SEED)
    infos = []
    for index in range(shards):
        lengths = rng.lognormal(np.log(180), 0.8, tokens // 200).astype(int) + 1
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths + 1), tokens))]
        file = io.BytesIO()
        texts = (
            np.append(
                rng.integers(tokenizer.special_ids[-1] + 1, tokenizer.vocab_size, n), tokenizer.sep_id
            ).astype(np.uint16)
            for n in lengths
        )
        documents, total = write_shard(file, f"train-{index:06d}", texts)
        content, name = file.getvalue(), f"train-{index:06d}.tar"
        (folder / name).write_bytes(content)
        infos.append(ShardInfo(name, len(content), hashlib.sha256(content).hexdigest(), documents, total))
    histogram = folder / HISTOGRAM_NAME
    np.save(histogram, np.ones(tokenizer.vocab_size, dtype=np.int64))  # nobody smooths by it here
    sha256 = hashlib.sha256(histogram.read_bytes()).hexdigest()
    Manifest(tokenizer, {"train": tuple(infos), "heldout": ()}, HISTOGRAM_NAME, sha256).save(folder)
    return str(folder)


def _print(figures: dict[str, Any]) -> None:
    print(f"{figures['shards']} shards, {figures['million_tokens']:.1f} million tokens; {figures['machine']}")
    print(f"{figures['versions']}; {figures['date']}; medians of {figures['rounds']} rounds, one process\n")
    rates = {**figures["tokens_per_s"], "(one H200 at BERT-base size takes)": H200_TOKENS_PER_S}
    ours = rates["this loader"]
    print(f"{'reader':<42}{'million tokens/s':>18}{'this loader is':>17}")
    for name, rate in rates.items():
        print(f"{name:<42}{rate / 1e6:>18.2f}{ours / rate:>16.1f}x")
    print(f"\n{'from start to':<42}{'first micro batch':>18}{'first step':>17}")
    for place, seconds in figures["first_batch"].items():
        print(f"{place:<42}{seconds['first_micro_batch_s']:>16.3f} s{seconds['first_step_s']:>15.3f} s")
    print(f"\nreadings of a shard in an epoch, one rank: {figures['readings_per_shard_and_epoch']:.2f}")
    print(f"memory above the start's, one rank: {figures['peak_memory_mib']:.0f} MiB")
