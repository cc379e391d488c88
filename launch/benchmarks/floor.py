"""The floor of a step: the time that its matrix products take, each at the best rate measured for its shape."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

CACHED_BYTES = 2**20
"""Of the results of batched small products, which need not leave a second-level cache."""


@dataclass(frozen=True)
class Product:
    """`count` products (rows, inner) x (inner, columns), of `batch` pairs of matrices each."""

    rows: int
    inner: int
    columns: int
    batch: int = 1
    count: float = 1.0

    @property
    def flops(self) -> float:
        return 2.0 * self.count * self.batch * self.rows * self.inner * self.columns


def linear(tokens: int, wide: int, out: int, count: float, backward: bool) -> list[Product]:
    """Of `count` linear maps of (tokens, wide) to (tokens, out), with both gradients where they are trained."""
    forward = Product(tokens, wide, out, count=count)
    gradients = [Product(tokens, out, wide, count=count), Product(out, tokens, wide, count=count)]
    return [forward, *gradients] if backward else [forward]


def attention(maps: int, length: int, size: int, count: float, backward: bool) -> list[Product]:
    """Of `count` layers with `maps` heads of all sequences: scores and weighted sums."""
    scores, sums = Product(length, size, length, maps), Product(length, length, size, maps)
    of_scores, of_sums = (2, 4) if backward else (1, 1)
    return [replace(scores, count=of_scores * count), replace(sums, count=of_sums * count)]


@dataclass
class BestTimes:
    """The best seconds seen so far of each shape."""

    seconds: dict[Product, float] = field(default_factory=dict)

    def measure(self, products: Iterable[Product]) -> None:
        """Once more, every shape of these."""
        for shape in {replace(product, count=1.0) for product in products}:
            self.seconds[shape] = min(_measured(shape), self.seconds.get(shape, math.inf))

    def floor(self, products: Iterable[Product]) -> float:
        """Seconds of all of them at the best rates."""
        return sum(each.count * self.seconds[replace(each, count=1.0)] for each in products)


def _measured(product: Product) -> float:
    """The best of three, after one to warm up; into memory already at hand."""
    small = max(1, CACHED_BYTES // (4 * product.rows * product.columns)) if product.batch > 1 else 1
    batch = min(product.batch, small)
    left = torch.randn(batch, product.rows, product.inner)
    right = torch.randn(batch, product.columns, product.inner)
    out = torch.empty(batch, product.rows, product.columns)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        if batch == 1:
            torch.mm(left[0], right[0].t(), out=out[0])
        else:
            torch.bmm(left, right.transpose(1, 2), out=out)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) * product.batch / batch
