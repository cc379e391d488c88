"""Forward and backward steps of distillation, teacher included, beside the plain formulation.

  plain original   full logits of both models at all positions, with the masked_select of the original code
  plain            the same formula without those copies
  fused all        ours, KD at all positions
  fused masked     ours, KD at masked positions only
  plain relation   the relations of the last layers alone, with whole maps and autograd
  fused relation   ours

They alternate within one run; medians are printed. Sizes are BERT-base's and DistilBERT's with random
weights. Peak memory is that of a fresh process each. The FLOP floor is the time that the matrix products of a
step need at the rate measured, between the steps, for the product with the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from data_prep.shard_format.files import write_json
from launch.benchmarks import options
from launch.benchmarks.options import Shape
from launch.machine import hardware
from train.config_sections.objective import ObjectiveConfig
from train.data.masking import MaskedBatch
from train.models.attention_vectors import AttentionVectors
from train.models.families import DecoderInputs, family_of
from train.models.students import make_student
from train.models.teacher import Teacher
from train.objective.build import MAX_RELATION_HEADS, build_objective
from train.objective.chunk_terms import VocabularyWeights, Workspace
from train.objective.fused_loss import vocabulary_loss
from train.objective.reference import original_distiller_loss, reference_cosine, reference_terms
from train.objective.relations import relation_loss
from train.objective.token_selection import SelectedTokens

FORMULATIONS = ("plain original", "plain", "fused all", "fused masked", "plain relation", "fused relation")
RELATIONS = ObjectiveConfig(kd_weight=0, mlm_weight=0, cosine_weight=0, relation_weight=1)
PROBABILITY = 0.15
RECIPE = ObjectiveConfig()
WIDTH, VOCABULARY, INNER = 768, 30522, 3072
TEACHER_LAYERS, STUDENT_LAYERS = 12, 6
RELATIONS_SHAPE = Shape(16, 512)
"""Batch and sequence at which the relation term's memory is measured."""
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", type=options.shapes, default="8x128,16x128", help="batch x sequence, with commas"
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
    figures: dict[str, Any] = {"machine": hardware(), "threads": args.threads}
    figures["steps"] = [
        row
        for index, shape in enumerate(args.shapes)
        for row in _time_steps(shape, args.rounds if index == 0 else -(-args.rounds // 2))
    ]
    _print_steps(figures["steps"])
    if not args.no_memory:
        figures["step_memory"] = _memory_of_steps(args.shapes[0], args.threads)
        figures["loss_memory"] = _memory_of_losses(args.memory_shape, args.threads)
        figures["relations_memory"] = _memory_of_relations(args.threads)
        _print_memory(figures, args.shapes[0], args.memory_shape)
    if args.json:
        write_json(args.json, figures)
    return 0


def _models() -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.manual_seed(0)
    teacher = BertForMaskedLM(BertConfig())
    student = make_student(teacher)
    return teacher.eval().requires_grad_(False), student


def _batch(batch: int, length: int) -> MaskedBatch:
    generator = torch.Generator().manual_seed(1)
    count = round(PROBABILITY * length)
    order = torch.rand(batch, length - 2, generator=generator).argsort(-1)[:, :count]
    return MaskedBatch(
        input_ids=torch.randint(1000, VOCABULARY, (batch, length), generator=generator),
        positions=order.sort(-1).values + 1,
        targets=torch.randint(1000, VOCABULARY, (batch, count), generator=generator),
        valid=torch.ones(batch, count, dtype=torch.bool),
    )


def _stepper(
    formulation: str, teacher: PreTrainedModel, student: PreTrainedModel
) -> Callable[[MaskedBatch], float]:
    """A function that makes one forward and backward step and returns the loss."""
    if formulation.startswith("fused"):
        relations = formulation == "fused relation"
        frozen = Teacher(
            [teacher], relation_layers=[TEACHER_LAYERS] if relations else None, relations_alone=relations
        )
        positions: Any = formulation.removeprefix("fused ")
        settings = RELATIONS if relations else ObjectiveConfig(kd_positions=positions)
        objective = build_objective(settings, student, frozen)

        def fused_step(masked: MaskedBatch) -> float:
            student.zero_grad(set_to_none=True)
            terms = objective(student, masked, frozen(masked.input_ids))
            terms.loss.backward()
            return float(terms.loss.detach())

        return fused_step

    if formulation == "plain relation":
        vectors = [
            AttentionVectors(family_of(model), model, layers)
            for model, layers in ((student, STUDENT_LAYERS), (teacher, TEACHER_LAYERS))
        ]

        def relation_step(masked: MaskedBatch) -> float:
            student.zero_grad(set_to_none=True)
            family_of(student).encode(student, masked.input_ids)
            with torch.no_grad():
                family_of(teacher).encode(teacher, masked.input_ids)
            loss = plain_relations(vectors[0].take(), vectors[1].take(), MAX_RELATION_HEADS)
            loss.backward()
            return float(loss.detach())

        return relation_step

    def plain_step(masked: MaskedBatch) -> float:
        student.zero_grad(set_to_none=True)
        of_student = student(masked.input_ids, output_hidden_states=True)
        with torch.no_grad():
            of_teacher = teacher(masked.input_ids, output_hidden_states=True)
        student_hidden, teacher_hidden = of_student.hidden_states[-1], of_teacher.hidden_states[-1]
        if formulation == "plain original":
            labels = torch.full_like(masked.input_ids, -100).scatter_(1, masked.positions, masked.targets)
            kept = torch.ones_like(masked.input_ids, dtype=torch.bool)
            loss = original_distiller_loss(
                of_student.logits, of_teacher.logits, student_hidden, teacher_hidden, kept, labels, RECIPE
            )
        else:
            terms = reference_terms(
                of_student.logits, [of_teacher.logits], [1.0], masked, temperature=RECIPE.temperature
            )
            loss = RECIPE.kd_weight * terms.kd + RECIPE.mlm_weight * terms.mlm
            loss = loss + RECIPE.cosine_weight * reference_cosine(student_hidden, teacher_hidden)
        loss.backward()
        return float(loss.detach())

    return plain_step


def plain_relations(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], heads: int
) -> torch.Tensor:
    """The relations' divergence of (B, L, width) vectors, as one would write it: whole maps, autograd."""
    total = torch.zeros(())
    for own, theirs in zip(student, teacher, strict=True):
        log_student, log_teacher = (
            torch.log_softmax(parts @ parts.transpose(-1, -2) / parts.shape[-1] ** 0.5, -1)
            for parts in (vectors.unflatten(-1, (heads, -1)).transpose(1, 2) for vectors in (own, theirs))
        )
        rows = log_student.shape[:-1].numel()
        total = total + functional.kl_div(log_student, log_teacher, log_target=True, reduction="sum") / rows
    return total


def step_flops(formulation: str, batch: int, length: int) -> float:
    """Floating-point operations of the matrix products of one step (attention's included).

    Relations need nothing of the last layers but their queries, keys and values.
    """
    tokens = batch * length
    if formulation.endswith("relation"):
        layer = 2 * (4 * WIDTH**2 + 2 * WIDTH * INNER) + 4 * length * WIDTH
        projections, maps = 6 * WIDTH**2, 3 * 2 * length * WIDTH
        of_teacher = (TEACHER_LAYERS - 1) * layer + projections + maps
        of_student = 3 * ((STUDENT_LAYERS - 1) * layer + projections) + 2 * maps
        return float(tokens * (of_teacher + of_student))
    decoded = batch * round(PROBABILITY * length) if formulation == "fused masked" else tokens
    per_layer = 2 * (4 * WIDTH**2 + 2 * WIDTH * INNER) + 4 * length * WIDTH
    head = 2 * (WIDTH**2 + WIDTH * VOCABULARY)
    teacher = TEACHER_LAYERS * per_layer * tokens + head * decoded
    student = STUDENT_LAYERS * per_layer * tokens + head * decoded
    return float(teacher + 3 * student)


def _time_steps(shape: Shape, rounds: int) -> list[dict[str, Any]]:
    batch, length = shape
    teacher, student = _models()
    student.train()
    masked = _batch(batch, length)
    steps = {name: _stepper(name, teacher, student) for name in FORMULATIONS}
    seconds: dict[str, list[float]] = {name: [] for name in FORMULATIONS}
    rates = []
    for round_number in range(rounds + 1):
        rates.append(_matmul_rate())
        for name, step in steps.items():
            start = time.perf_counter()
            step(masked)
            if round_number > 0:  # the first round warms caches and allocator
                seconds[name].append(time.perf_counter() - start)
    rate = statistics.median(rates)
    baseline = statistics.median(seconds["plain original"])
    rows = []
    for name in FORMULATIONS:
        median = statistics.median(seconds[name])
        floor = step_flops(name, batch, length) / rate
        rows.append(
            {
                "shape": str(shape),
                "formulation": name,
                "tokens_per_s": batch * length / median,
                "step_s": median,
                "best_s": min(seconds[name]),
                "ratio": baseline / median,
                "best_ratio": min(seconds["plain original"]) / min(seconds[name]),
                "gflop": step_flops(name, batch, length) / 1e9,
                "matmul_gflop_per_s": rate / 1e9,
                "floor_s": floor,
                "floor_share": floor / median,
            }
        )
    return rows


def _matmul_rate() -> float:
    """FLOP/s of the product with the vocabulary at 512 rows, into memory already at hand."""
    left, right = torch.randn(512, WIDTH), torch.randn(VOCABULARY, WIDTH)
    out = torch.empty(512, VOCABULARY)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(left, right.t(), out=out)
        times.append(time.perf_counter() - start)
    return 2 * 512 * WIDTH * VOCABULARY / min(times)


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
    teacher, student = _models()
    student.train()
    step, masked = _stepper(formulation, teacher, student), _batch(batch, length)
    before = _resident_peak(reset=True)
    step(masked)
    return _resident_peak() - before


def _loss_memory(formulation: str, batch: int, length: int) -> int:
    """The same for the vocabulary part alone, from features to their gradients."""
    masked, tokens = _batch(batch, length), batch * length
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


def _memory_of_steps(shape: Shape, threads: int) -> dict[str, int]:
    return {name: _child("step", name, shape, threads) for name in FORMULATIONS if name != "plain"}


def _memory_of_relations(threads: int) -> dict[str, int]:
    """Of the relation term alone, from vectors to their gradients."""
    return {
        name: _child("relations", name, RELATIONS_SHAPE, threads)
        for name in ("plain relation", "fused relation")
    }


def _relations_memory(formulation: str, batch: int, length: int) -> int:
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
    print(
        f"matrix products: {rows[0]['matmul_gflop_per_s']:.0f} GFLOP/s; step s: median; ratios: to plain original"
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
