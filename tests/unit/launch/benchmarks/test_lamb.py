"""The benchmark's own arithmetic, on small tensors."""

from __future__ import annotations

import pytest
import torch

from launch.benchmarks import lamb
from tests.lamb_checks import STEP_ROUNDINGS, U


def test_distilberts_tensors() -> None:
    shapes = lamb.distilbert_shapes()
    assert len(shapes) == 105
    assert sum(shape.numel() for shape in shapes.values()) == 66_985_530


def test_contenders_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = {"a.weight": torch.Size((64, 48)), "b.weight": torch.Size((7, 5))}
    torch.manual_seed(0)
    contenders = lamb.make_contenders(shapes, torch.device("cpu"))
    times = lamb.measure({name: run for name, (run, _) in contenders.items()}, rounds=2, device="cpu")
    assert all(len(values) == 2 for values in times.values())
    rows = lamb.summarise({"ours": [0.002], "copy": [0.001]}, {"ours": 40, "copy": 8}, numel=10**6)
    assert [row["gb_per_s"] for row in rows] == pytest.approx([20, 8])
    assert [row["share_of_copy"] for row in rows] == pytest.approx([2.5, 1])
    assert [row["times_of_lamb"] for row in rows] == pytest.approx([1, 0.5])
    figures = dict.fromkeys(("parameters", "tensors", "device", "threads", "torch", "rounds"), 1)
    lamb.print_table({**figures, "rows": rows})
    assert "250%" in capsys.readouterr().out


@pytest.mark.parametrize("alternative", ["LoopLamb", "ForeachLamb"])
def test_alternatives_compute_lamb(alternative: str) -> None:
    from launch.benchmarks import lamb_alternatives
    from train.lamb import Lamb

    start = torch.linspace(-1, 1, 35, dtype=torch.float64).view(7, 5)
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    ours = Lamb([("weight", weights[0])], lr=0.1)
    other = getattr(lamb_alternatives, alternative)([weights[1]], lr=0.1)
    moved = torch.zeros_like(start)
    for step in range(3):
        before = weights[0].detach().clone()
        for weight, optimizer in zip(weights, (ours, other), strict=True):
            weight.grad = torch.full_like(start, 0.5 + step)
            optimizer.step()
        moved += (weights[0].detach() - before).abs()
    # All is fp64 but Lamb's trust ratio: one rounding to fp32 in each update, and twice that for its effect on the
    # later ones.
    fp64 = 3 * STEP_ROUNDINGS * 2.0**-53 * (start.abs() + moved)
    assert ((weights[0] - weights[1]).abs() <= 2 * U * moved + fp64).all()
