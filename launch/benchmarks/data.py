"""Corpus to shards: write_shards beside the bare tokenizer and beside datasets.map, and on 1 and 2 processes.

  encode_batch_fast   the tokenizer alone on texts in memory, all cores, results thrown away: the floor
  datasets.map        batched, one process per core, then shards of the same format: the usual way
  write_shards        everything: unpack, parse, digest, tokenise, shuffle, write, manifest

Times leave out imports and loading the tokenizer, for all alike; "cpu s" is what all processes used together
(under mpirun: rank 0 alone), which says more than the clock on a machine with other work. Example:

    python launch/benchmark.py data --corpus corpus.jsonl.gz --tokenizer bert-base-uncased --rounds 3
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.shard_format.files import write_json
from data_prep.sources.streams import open_stream
from data_prep.write_shards import load_tokenizer
from launch.benchmarks import options
from train.errors import UserError

RUNS = Path(__file__).with_name("data_runs.py")
RATIOS = (
    ("write_shards / encode_batch_fast", "encode_batch_fast", "write_shards"),
    ("write_shards / datasets.map", "datasets.map", "write_shards"),
    ("2 processes / 1 process", "write_shards, 1 process", "write_shards, 2 processes"),
    ("2 ranks / 1 rank", "write_shards, 1 rank", "write_shards, 2 ranks"),
)
"""(label, what is compared with, what is measured): how many times as fast."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--corpus",
        type=options.existing_file,
        required=True,
        help="JSON lines with a field text, plain or packed",
    )
    parser.add_argument("--tokenizer", required=True, help="a Hugging Face folder or name")
    parser.add_argument(
        "--documents", type=int, default=20_000, help="how many of the corpus; 0: all (default 20000)"
    )
    parser.add_argument(
        "--rounds", type=options.at_least_1, default=3, help="each compares everything once (default 3)"
    )
    parser.add_argument("--no-mpi", action="store_true", help="leave out the runs under mpirun")
    parser.add_argument("--json", type=options.new_file, metavar="FILE", help="write the figures there too")


def main(args: argparse.Namespace) -> int:
    if args.documents < 0:
        raise UserError(f"--documents {args.documents}: give 0 for all, or more")
    load_tokenizer(args.tokenizer)  # before the first run meets what is wrong with it
    with tempfile.TemporaryDirectory() as folder:
        corpus = _first_documents(str(args.corpus), args.documents, folder)
        results = _measure(corpus, args, folder)
    figures = _figures(results)
    _print_table(figures)
    if args.json:
        write_json(args.json, figures)
    return 0


def _first_documents(corpus: str, count: int, folder: str) -> str:
    """The first `count` lines, packed as before where that is gzip: unpacking is part of the work."""
    if not count:
        return corpus
    path = os.path.join(folder, "corpus.jsonl.gz")
    with open_stream(corpus) as opened, gzip.open(path, "wb", compresslevel=6) as file:
        file.writelines(islice(opened.stream, count))
    return path


def _commands(corpus: str, args: argparse.Namespace, out: str) -> Iterator[tuple[str, list[str]]]:
    cores = len(os.sched_getaffinity(0))
    python = [sys.executable, str(RUNS)]
    inputs = [corpus, args.tokenizer, out]
    yield "encode_batch_fast", [*python, "encode_batch_fast", *inputs, str(cores)]
    yield "datasets.map", [*python, "datasets_map", *inputs, str(cores)]
    for count in sorted({1, 2, cores}):
        name = f"write_shards, {count} process{'es' if count > 1 else ''}"
        yield name, [*python, "write_shards", *inputs, "--processes", str(count)]
    mpirun = shutil.which(
        "mpirun", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    )
    for count in () if args.no_mpi or not mpirun else (1, 2):
        name = f"write_shards, {count} rank{'s' if count > 1 else ''}"
        yield name, [str(mpirun), "-n", str(count), *python, "write_shards", *inputs]


def _measure(corpus: str, args: argparse.Namespace, folder: str) -> dict[str, list[dict[str, float]]]:
    results: dict[str, list[dict[str, float]]] = {}
    out = os.path.join(folder, "out")
    for round_number in range(args.rounds):
        for name, command in _commands(corpus, args, out):
            shutil.rmtree(out, ignore_errors=True)
            print(f"round {round_number + 1}: {name}", file=sys.stderr, flush=True)
            env = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
            env.pop("TOKENIZERS_PARALLELISM", None)
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"{name} failed: {done.stderr.strip()[-2000:]}")
            results.setdefault(name, []).append(json.loads(done.stdout.strip().splitlines()[-1]))
    return results


def _figures(results: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians by run, and the ratios of speeds that matter."""
    cores = len(os.sched_getaffinity(0))
    rows: dict[str, dict[str, Any]] = {}
    for name, runs in results.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        rows[name] = {
            "seconds": seconds,
            "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
            "tokens_per_s": runs[0]["tokens"] / seconds,
            "documents_per_s": runs[0]["documents"] / seconds,
            "all_seconds": [run["seconds"] for run in runs],
        }
    best = f"write_shards, {cores} process{'es' if cores > 1 else ''}"
    ratios: dict[str, float] = {}
    for label, base, other in RATIOS:
        other = best if other == "write_shards" else other
        if base in rows and other in rows:
            # Within a round, so that what else the machine does hits both.
            pairs = zip(rows[base]["all_seconds"], rows[other]["all_seconds"], strict=True)
            ratios[label] = statistics.median(a / b for a, b in pairs)
    return {"cores": cores, "runs": rows, "ratios": ratios}


def _print_table(figures: dict[str, Any]) -> None:
    print(
        f"{'':28} {'seconds':>9} {'cpu s':>9} {'tokens/s':>12} {'documents/s':>12}   ({figures['cores']} cores)"
    )
    for name, row in figures["runs"].items():
        print(
            f"{name:28} {row['seconds']:>9.2f} {row['cpu_seconds']:>9.2f} "
            f"{row['tokens_per_s']:>12,.0f} {row['documents_per_s']:>12,.0f}"
        )
    print()
    for label, ratio in figures["ratios"].items():
        print(f"{label:36} {ratio:>6.2f} x")
