"""The floor of the objective's steps: products counted by hand, and the best time of each shape."""

from __future__ import annotations

import pytest

from launch.benchmarks import floor
from launch.benchmarks.floor import BestTimes, Product
from launch.benchmarks.objective_steps import step_products

LAYER = 2 * (4 * 768**2 + 2 * 768 * 3072) + 4 * 128 * 768
"""FLOPs of a token in one layer of BERT-base at 128 tokens."""


def flops(formulation: str) -> float:
    return sum(product.flops for product in step_products(formulation, 8, 128)) / (8 * 128)


def test_products_by_hand() -> None:
    """Per token; the student's three passes."""
    head = 2 * (768**2 + 768 * 30522)
    assert flops("fused all") == flops("plain") == pytest.approx(12 * LAYER + head + 3 * (6 * LAYER + head))
    masked = 19 / 128  # round(0.15 x 128) of them
    assert flops("fused masked") == pytest.approx(
        12 * LAYER + masked * head + 3 * (6 * LAYER + masked * head)
    )
    projections, maps = 6 * 768**2, 3 * 2 * 128 * 768
    relations = 11 * LAYER + projections + maps + 3 * (5 * LAYER + projections) + 2 * maps
    assert flops("fused relation") == flops("plain relation") == pytest.approx(relations)


def test_the_floor_takes_the_best_time_of_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([3.0, 2.0])
    monkeypatch.setattr(floor, "_measured", lambda *product: next(seconds))
    best, twice = BestTimes(), [Product(2, 3, 4, count=2), Product(2, 3, 4, count=5)]
    best.measure(twice)
    assert best.floor(twice) == 7 * 3.0
    best.measure(twice)
    assert best.floor(twice) == 7 * 2.0


def test_small_products_are_measured() -> None:
    for product in (Product(3, 2, 4), Product(3, 2, 4, batch=5), Product(600, 2, 600, batch=5)):
        best = BestTimes()
        best.measure([product])
        assert best.floor([product]) > 0
