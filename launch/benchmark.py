"""Measure one part of Halfling on this machine, beside its floor and its alternatives.

    python launch/benchmark.py data | loader | lamb | objective | step | checkpoint | inference | gpu   [options]

Every benchmark alternates the things it compares within one run and prints a table with their ratio; the
figures of record stand in docs/BENCHMARKS.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.shard_format.required_packages import require_packages

require_packages()

from launch.benchmarks import data
from launch.common.cli import command_parser, run_main

BENCHMARKS = {
    "data": "corpus to shards: documents/s and tokens/s beside the bare tokenizer and datasets.map",
    "loader": "shards to batches: tokens/s of one loader beside a stock webdataset pipeline",
    "lamb": "optimizer step: GB/s beside foreach, per-tensor loops and fused AdamW",
    "objective": "forward and backward step: tokens/s and memory beside the plain formulation",
    "step": "whole training steps under the engine: tokens/s, shares and floor, beside the original formulation",
    "checkpoint": "a checkpoint written, digested, checked and loaded: seconds beside the disk's speed",
    "gpu": "the first look at a GPU: its tests, training steps of every objective, memory, waits, LAMB; not run yet",
    "inference": "student beside teacher: latency and sentences/s in torch, torch.compile, ONNX Runtime and int8",
}


def main(arguments: Sequence[str]) -> int:
    """Parse, measure, print."""
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, summary in BENCHMARKS.items():
        commands.add_parser(name, help=summary, description=summary, add_help=False)
    known, rest = parser.parse_known_args(arguments)
    benchmark = _benchmark(known.benchmark)
    options = command_parser(benchmark.__doc__, prog=f"benchmark.py {known.benchmark}")
    benchmark.add_arguments(options)
    code: int = benchmark.main(options.parse_args(rest))
    return code


def _benchmark(name: str) -> ModuleType:
    """Only the chosen one is imported: each takes the seconds of what it compares itself with."""
    if name == "data":
        return data
    if name == "loader":
        from launch.benchmarks import loader

        return loader
    if name == "lamb":
        from launch.benchmarks import lamb

        return lamb
    if name == "objective":
        from launch.benchmarks import objective

        return objective
    if name == "step":
        from launch.benchmarks.training import step

        return step
    if name == "checkpoint":
        from launch.benchmarks.training import checkpoint

        return checkpoint
    if name == "gpu":
        from launch.benchmarks import gpu

        return gpu
    from launch.benchmarks import inference

    return inference


if __name__ == "__main__":
    run_main(main)
