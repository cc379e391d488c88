"""Measure one part of Halfling on this machine, beside its floor and its alternatives.

    python launch/benchmark.py data | loader | lamb | objective | inference   [options; --help teaches each]

Every benchmark alternates the things it compares within one run and prints a table with their ratio; the
figures of record stand in docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.cli import run_main

BENCHMARKS = {
    "data": "corpus to shards: documents/s and tokens/s beside the bare tokenizer and datasets.map",
    "loader": "shards to batches: tokens/s of one loader beside a stock webdataset pipeline",
    "lamb": "optimizer step: GB/s beside foreach, per-tensor loops and fused AdamW",
    "objective": "forward and backward step: tokens/s and memory beside the plain formulation",
    "inference": "student beside teacher: latency and sentences/s in torch, torch.compile, ONNX Runtime and int8",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True)
    # Only the chosen benchmark's module is imported: each pulls in what it compares itself with.
    for name, summary in BENCHMARKS.items():
        command = commands.add_parser(name, help=summary, description=summary, add_help=False)
        command.set_defaults(module=f"launch.benchmarks.{name}")
    known, rest = parser.parse_known_args()
    benchmark = importlib.import_module(known.module)
    options = argparse.ArgumentParser(
        prog=f"benchmark.py {known.benchmark}",
        description=benchmark.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmark.add_arguments(options)
    return benchmark.main(options.parse_args(rest))


if __name__ == "__main__":
    run_main(lambda arguments: main())
