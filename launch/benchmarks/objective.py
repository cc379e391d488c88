"""Forward and backward steps of distillation, teacher included, beside the plain formulation.

  plain original   full logits of both models at all positions, with the masked_select of the original code
  plain            the same formula without those copies
  fused all        ours, KD at all positions
  fused masked     ours, KD at masked positions only
  plain relation   the relations of the last layers alone, with whole maps and autograd
  fused relation   ours

They alternate within one run; medians are printed. Sizes are BERT-base's and DistilBERT's with random
weights; the student of ours has its dropout by C loops (train/models/cpu/dropout.py), and all keep freed memory
(train/distributed/host_memory.py), as in a run. Peak memory is that of a fresh process each, which does not keep it.
The floor is the time that the matrix products of a step take, each at the best rate that is measured between the steps
for its shape.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from data_prep.shard_format.files import write_json
from launch.benchmarks import options
from launch.benchmarks.floor import BestTimes
from launch.benchmarks.objective_steps import (
    FORMULATIONS,
    RECIPE,
    VOCABULARY,
    WIDTH,
    example_batch,
    plain_relations,
    step_products,
    stepper,
)
from launch.benchmarks.options import Shape
from launch.common.machine import hardware
from train.config_sections.objective import ObjectiveConfig
from train.distributed.host_memory import keep_freed_memory
from train.models.families import DecoderInputs
from train.objective.build import MAX_RELATION_HEADS
from train.objective.chunk_terms import VocabularyWeights, Workspace
from train.objective.fused_loss import vocabulary_loss
from train.objective.reference import original_distiller_loss
from train.objective.relations import relation_loss
from train.objective.token_selection import SelectedTokens

RELATIONS_SHAPE = Shape(16, 512)
"""Batch and sequence at which the relation term's memory is measured."""
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", type=options.shapes, default="8x128,16x128", help="batch x sequence, with commas"
    )
    parser.add_argument(
        "--formulations",
        type=options.one_or_more_of(FORMULATIONS),
        default=FORMULATIONS,
        help="with commas; ratios are to the first of them (default: all)",
    )
    parser.add_argument(
        "--rounds",
        type=options.at_least_1,
        default=4,
        help="timed steps of each at the first shape, half of it at the others (default 4)",
    )
    parser.add_argument("--threads", type=options.at_least_1, default=os.cpu_count(), help="torch's threads")
    parser.add_argument(
        "--memory-shape", type=options.shape, default="64x512", help="batch x sequence of the loss's memory"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave the memory measurements out")
    parser.add_argument("--json", type=options.new_file, metavar="FILE", help="also write the figures here")
    parser.add_argument("--child", help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    if args.child:
        kind, formulation, shape = args.child.split(":")
        measure = {"step": _step_memory, "loss": _loss_memory, "relations": _relations_memory}[kind]
        print(json.dumps(measure(formulation, *options.shape(shape))))
        return 0
    keep_freed_memory()
    figures: dict[str, Any] = {"machine": hardware(), "threads": args.threads}
    figures["steps"] = [
        row
        for index, shape in enumerate(args.shapes)
        for row in _time_steps(shape, args.formulations, args.rounds if index == 0 else -(-args.rounds // 2))
    ]
    _print_steps(figures["steps"])
    if not args.no_memory:
        figures["step_memory"] = {
            name: _child("step", name, args.shapes[0], args.threads)
            for name in FORMULATIONS
            if name != "plain"
        }
        figures["loss_memory"] = _memory_of_losses(args.memory_shape, args.threads)
        figures["relations_memory"] = {
            name: _child("relations", name, RELATIONS_SHAPE, args.threads)
            for name in ("plain relation", "fused relation")
        }
        _print_memory(figures, args.shapes[0], args.memory_shape)
    if args.json:
        write_json(args.json, figures)
    return 0


def _time_steps(shape: Shape, names: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    batch, length = shape
    masked = example_batch(batch, length)
    steps = {name: stepper(name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    products = {name: step_products(name, batch, length) for name in names}
    best = BestTimes()
    for round_number in range(rounds + 1):
        best.measure(itertools.chain(*products.values()))
        for name, step in steps.items():
            start = time.perf_counter()
            step(masked)
            if round_number > 0:  # the first round warms caches and allocator
                seconds[name].append(time.perf_counter() - start)
    baseline = statistics.median(seconds[names[0]])
    rows = []
    for name in names:
        median = statistics.median(seconds[name])
        floor, flops = best.floor(products[name]), sum(product.flops for product in products[name])
        rows.append(
            {
                "shape": str(shape),
                "formulation": name,
                "tokens_per_s": batch * length / median,
                "step_s": median,
                "best_s": min(seconds[name]),
                "ratio": baseline / median,
                "best_ratio": min(seconds[names[0]]) / min(seconds[name]),
                "gflop": flops / 1e9,
                "matmul_gflop_per_s": flops / floor / 1e9,
                "floor_s": floor,
                "floor_share": floor / median,
            }
        )
    return rows


def _resident_peak(reset: bool = False) -> int:
    """Bytes of this process's largest resident set (getrusage's would begin at the parent's)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status; memory is measured on Linux only")


def _step_memory(formulation: str, batch: int, length: int) -> int:
    """Bytes by which one step raises a fresh process's peak, models and their loading not counted."""
    step, masked = stepper(formulation), example_batch(batch, length)
    before = _resident_peak(reset=True)
    step(masked)
    return _resident_peak() - before


def _loss_memory(formulation: str, batch: int, length: int) -> int:
    """The same for the vocabulary part alone, from features to their gradients."""
    masked, tokens = example_batch(batch, length), batch * length
    features = torch.randn(tokens, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH).mul_(0.02).requires_grad_()
    bias = torch.zeros(VOCABULARY, requires_grad=True)
    frozen = torch.randn(tokens, WIDTH), torch.randn(VOCABULARY, WIDTH).mul_(0.02), torch.zeros(VOCABULARY)
    before = _resident_peak(reset=True)
    if formulation == "fused all":
        count = masked.targets.numel()
        vocabulary_loss(
            DecoderInputs(features, weight, bias),
            [DecoderInputs(*frozen)],
            SelectedTokens(
                torch.arange(tokens),
                torch.full((tokens,), 1 / tokens),
                masked.targets.flatten(),
                torch.full((count,), 1 / count),
            ),
            VocabularyWeights(RECIPE.temperature, RECIPE.kd_weight, RECIPE.mlm_weight),
            workspace=Workspace(),
        ).loss.backward()
    else:
        logits = torch.nn.functional.linear(features, weight, bias).view(batch, length, -1)
        with torch.no_grad():
            teacher_logits = torch.nn.functional.linear(*frozen).view(batch, length, -1)
        labels = torch.full_like(masked.input_ids, -100).scatter_(1, masked.positions, masked.targets)
        kept = torch.ones_like(masked.input_ids, dtype=torch.bool)
        hidden = features.view(batch, length, -1)
        original_distiller_loss(
            logits, teacher_logits, hidden, hidden, kept, labels, ObjectiveConfig(cosine_weight=0.0)
        ).backward()
    return _resident_peak() - before


def _child(kind: str, formulation: str, shape: Shape, threads: int) -> int:
    script = Path(__file__).resolve().parents[1] / "benchmark.py"
    command = [sys.executable, str(script), "objective", "--threads", str(threads)]
    result = subprocess.run(
        [*command, "--child", f"{kind}:{formulation}:{shape}"], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(f"measuring {formulation} at {shape} failed: {result.stderr[-2000:]}")
    return int(json.loads(result.stdout.splitlines()[-1]))


def _relations_memory(formulation: str, batch: int, length: int) -> int:
    """Of the relation term alone, from vectors to their gradients."""
    vectors = [
        [torch.randn(batch, length, WIDTH, requires_grad=gradient) for _ in range(3)]
        for gradient in (True, False)
    ]
    weights = torch.full((batch, length), 1 / (batch * length))
    before = _resident_peak(reset=True)
    if formulation == "fused relation":
        relation_loss(vectors[0], vectors[1], weights, heads=MAX_RELATION_HEADS).backward()
    else:
        plain_relations(vectors[0], vectors[1], MAX_RELATION_HEADS).backward()
    return _resident_peak() - before


def _memory_of_losses(shape: Shape, threads: int) -> dict[str, Any]:
    """Ours measured at `shape`; the original's from two sizes that fit, along the line through them."""
    batch, length = shape
    small = [max(1, batch // 32), max(2, batch // 16)]  # at 64 x 512: 1024 and 2048 tokens
    points = [(b * length, _child("loss", "plain original", Shape(b, length), threads)) for b in small]
    slope = (points[1][1] - points[0][1]) / (points[1][0] - points[0][0])
    plain = points[1][1] + slope * (batch * length - points[1][0])
    fused = _child("loss", "fused all", shape, threads)
    return {"plain_points": points, "plain_extrapolated": plain, "fused": fused, "share": fused / plain}


def _print_steps(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'shape':>8} {'formulation':<15} {'tokens/s':>9} {'step s':>8} {'ratio':>6} {'best s':>7} {'ratio':>6} "
        f"{'GFLOP':>7} {'floor s':>8} {'share':>6}"
    )
    for row in rows:
        print(
            f"{row['shape']:>8} {row['formulation']:<15} {row['tokens_per_s']:>9.0f} {row['step_s']:>8.3f} "
            f"{row['ratio']:>6.2f} {row['best_s']:>7.3f} {row['best_ratio']:>6.2f} {row['gflop']:>7.0f} "
            f"{row['floor_s']:>8.3f} {row['floor_share']:>6.0%}"
        )
    rates = [row["matmul_gflop_per_s"] for row in rows]
    print(
        f"matrix products: {min(rates):.0f} to {max(rates):.0f} GFLOP/s; step s: median; ratios: to "
        f"{rows[0]['formulation']}"
    )


def _print_memory(figures: dict[str, Any], step_shape: Shape, loss_shape: Shape) -> None:
    print(f"\npeak memory of one step at {step_shape}, beyond the models")
    for name, size in figures["step_memory"].items():
        print(f"  {name:<15} {size / GIB:>7.2f} GiB")
    loss = figures["loss_memory"]
    measured = ", ".join(f"{size / GIB:.2f} GiB at {tokens} tokens" for tokens, size in loss["plain_points"])
    print(f"\nextra memory of the vocabulary loss at {loss_shape}")
    print(f"  plain original  {loss['plain_extrapolated'] / GIB:>7.2f} GiB (linear from {measured})")
    print(f"  fused all       {loss['fused'] / GIB:>7.2f} GiB, {loss['share']:.1%} of it")
    relations = figures["relations_memory"]
    print(f"\nextra memory of the relation term at {RELATIONS_SHAPE}")
    for name, size in relations.items():
        print(f"  {name:<15} {size / GIB:>7.2f} GiB")
