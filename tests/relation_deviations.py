"""How far is the relation term from its formula? Random problems, in every number format, both forms of the pass.

    python tests/relation_deviations.py --problems 200 [--seed 0]

Prints the largest deviations of values and gradients from train/objective/reference.py in fp64, which is given the
same vectors, rounded to the format; each over the largest magnitude of its problem where that is above 1.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.common.cli import command_parser
from train.objective.reference import reference_relations
from train.objective.relations import relation_loss
from train.objective.relations_native import build
from train.objective.token_selection import keep_weights

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMS = ("C loops", "torch operations")


@dataclass(frozen=True)
class Problem:
    """Vectors (B, L, width) of two models in fp64, and a division of the maps into chunks."""

    student: list[torch.Tensor]
    teacher: list[torch.Tensor]
    heads: int
    mask: torch.Tensor | None
    num_tokens: float | None
    chunk_maps: int


def draw(seed: int) -> Problem:
    """Of random shapes and magnitudes, some with padding, some as slices of one tensor."""
    draws, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, length, heads = draws.randint(1, 4), draws.choice([1, 2, 5, 9, 16, 33, 70]), draws.randint(1, 4)
    scale = draws.choice([0.1, 1.0, 8.0])
    models = []
    for width in (heads * draws.randint(1, 9) for _ in range(2)):
        whole = scale * torch.randn(batch, length, 3 * width, generator=generator, dtype=torch.float64)
        parts = list(whole.chunk(3, -1))
        models.append(parts if draws.random() < 0.5 else [each.contiguous() for each in parts])
    padded = torch.rand(batch, length, generator=generator) < 0.7
    return Problem(
        *models,
        heads=heads,
        mask=padded if draws.random() < 0.5 else None,
        num_tokens=draws.choice([None, 5.0]),
        chunk_maps=draws.choice([1, 2, 7, 100]),
    )


def deviations(problem: Problem, dtype: torch.dtype, form: str) -> tuple[float, float]:
    """Largest of the value, and of the three gradients."""
    student = [vectors.to(dtype).requires_grad_() for vectors in problem.student]
    teacher = [vectors.to(dtype) for vectors in problem.teacher]
    ids = torch.zeros(student[0].shape[:2], dtype=torch.long)
    weights = keep_weights(ids, problem.mask, problem.num_tokens).view_as(ids)
    chunk_maps = None if form == "C loops" else problem.chunk_maps
    loss = relation_loss(student, teacher, weights, problem.mask, heads=problem.heads, chunk_maps=chunk_maps)
    loss.backward()
    exact = [vectors.detach().double().requires_grad_() for vectors in student]
    exact_teacher = [vectors.double() for vectors in teacher]
    expected = reference_relations(exact, exact_teacher, problem.heads, problem.mask, problem.num_tokens)
    expected.backward()
    gradients = zip(student, exact, strict=True)
    return _deviation(loss, expected), max(_deviation(own.grad, other.grad) for own, other in gradients)


def _deviation(own: torch.Tensor | None, exact: torch.Tensor | None) -> float:
    assert own is not None
    assert exact is not None
    difference = (own.detach().double() - exact.detach()).abs().max()
    return float(difference / exact.detach().abs().max().clamp_min(1.0))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    print("| dtype | form | value | gradients |\n|---|---|---|---|")
    for name, dtype in DTYPES.items():
        for form in FORMS:
            if form == "C loops" and build(torch.promote_types(dtype, torch.float32)) is None:
                continue  # no C compiler
            found = [
                deviations(draw(seed), dtype, form) for seed in range(args.seed, args.seed + args.problems)
            ]
            value, gradient = (max(column) for column in zip(*found, strict=True))
            print(f"| {name} | {form} | {value:.1e} | {gradient:.1e} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
