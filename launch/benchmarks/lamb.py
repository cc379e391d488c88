"""One optimizer step on DistilBERT's 105 tensors (66,985,530 fp32 parameters, random values, no download).

Compared: this project's Lamb (its default kernel and its plain form), LAMB as a loop over tensors, LAMB in
torch foreach operations, torch's fused AdamW, and a plain copy of as many fp32 elements, whose speed (8 bytes
per element, all of torch's threads) is the machine's copy bandwidth. All of them take turns within each
round; the figures are medians over the rounds. GB/s count 40 bytes per parameter for LAMB, whatever a form of it
really moves (two passes: p, g, m, v read and m, v written; p, m, v read and p written), and 28 for AdamW.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from data_prep.shard_format.files import write_json
from launch.benchmarks import options
from launch.benchmarks.lamb_alternatives import ForeachLamb, LoopLamb
from launch.common.machine import hardware
from train.lamb import Lamb

LAMB_BYTES = 40
ADAMW_BYTES = 28
COPY_BYTES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=options.at_least_1, default=15, help="timed rounds (default 15)")
    parser.add_argument(
        "--threads", type=options.at_least_1, default=None, help="torch threads (default: torch's own)"
    )
    parser.add_argument("--device", type=options.device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--json", type=options.new_file, metavar="FILE", help="also write the figures here")


def main(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    shapes = distilbert_shapes()
    numel = sum(shape.numel() for shape in shapes.values())
    contenders = make_contenders(shapes, torch.device(args.device))
    times = measure({name: run for name, (run, _) in contenders.items()}, args.rounds, args.device)
    rows = summarise(times, {name: size for name, (_, size) in contenders.items()}, numel)
    report = {
        "parameters": numel,
        "tensors": len(shapes),
        "device": hardware(args.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": args.rounds,
        "rows": rows,
    }
    print_table(report)
    if args.json:
        write_json(args.json, report)
    return 0


def distilbert_shapes() -> dict[str, torch.Size]:
    """Name and shape of every parameter of distilbert-base with its MLM head, the tied decoder once."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    with torch.device("meta"):
        model = DistilBertForMaskedLM(DistilBertConfig())
        model.tie_weights()
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def make_contenders(
    shapes: dict[str, torch.Size], device: torch.device
) -> dict[str, tuple[Callable[[], Any], int]]:
    """What to time, each with parameters and state of its own, and its bytes per parameter."""
    gradients = {name: torch.randn(shape, device=device) * 1e-3 for name, shape in shapes.items()}

    def parameters() -> dict[str, torch.nn.Parameter]:
        made = {name: torch.nn.Parameter(torch.randn(s, device=device) * 0.02) for name, s in shapes.items()}
        for name, parameter in made.items():
            parameter.grad = gradients[name]
        return made

    # A learning rate of 1e-6 keeps every contender's numbers ordinary over any number of rounds.
    default = Lamb(parameters().items(), lr=1e-6)
    plain = Lamb(parameters().items(), lr=1e-6, fused=False)
    default.step()  # chooses its kernel, and builds it
    loop, foreach = LoopLamb(parameters().values(), lr=1e-6), ForeachLamb(parameters().values(), lr=1e-6)
    adamw = torch.optim.AdamW(parameters().values(), lr=1e-6, fused=True)
    source = torch.cat([gradient.view(-1) for gradient in gradients.values()])
    target = torch.empty_like(source)
    return {
        f"Lamb ({default.kernel})": (default.step, LAMB_BYTES),
        "Lamb (eager, chunked)": (plain.step, LAMB_BYTES),
        "LAMB, loop over tensors": (loop.step, LAMB_BYTES),
        "LAMB, torch foreach": (foreach.step, LAMB_BYTES),
        "AdamW, torch fused": (adamw.step, ADAMW_BYTES),
        "copy": (lambda: target.copy_(source), COPY_BYTES),
    }


def measure(runs: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each run in each round; two rounds before them are not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 2):
        for name, run in runs.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_ >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def summarise(times: dict[str, list[float]], sizes: dict[str, int], numel: int) -> list[dict[str, Any]]:
    seconds = {name: statistics.median(values) for name, values in times.items()}
    rates = {name: sizes[name] * numel / seconds[name] / 1e9 for name in seconds}
    ours = next(iter(seconds))
    return [
        {
            "name": name,
            "ms": seconds[name] * 1e3,
            "ms_min": min(times[name]) * 1e3,
            "gb_per_s": rates[name],
            "share_of_copy": rates[name] / rates["copy"],
            "times_of_lamb": seconds[name] / seconds[ours],
        }
        for name in seconds
    ]


def print_table(report: dict[str, Any]) -> None:
    print(
        f"{report['parameters']:,} parameters in {report['tensors']} tensors; {report['device']}, "
        f"{report['threads']} threads, torch {report['torch']}; medians of {report['rounds']} rounds"
    )
    print(f"{'':26}{'ms':>9}{'best ms':>9}{'GB/s':>8}{'of copy':>9}{'x Lamb':>8}")
    for row in report["rows"]:
        print(
            f"{row['name']:26}{row['ms']:9.1f}{row['ms_min']:9.1f}{row['gb_per_s']:8.1f}"
            f"{row['share_of_copy']:9.0%}{row['times_of_lamb']:8.2f}"
        )
