"""The floor of a step: the time that its matrix products take, each at the best rate measured for its shape, and the
time that memory takes for bytes that nothing can save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch

from train.models.flops import random_operand

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

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    seconds: dict[Product, float] = field(default_factory=dict)

    def measure(self, products: Iterable[Product]) -> None:
        """Once more, every shape of these."""
        for shape in {replace(product, count=1.0) for product in products}:
            self.seconds[shape] = min(
                _measured(shape, self.device, self.dtype), self.seconds.get(shape, math.inf)
            )

    def floor(self, products: Iterable[Product]) -> float:
        """Seconds of all of them at the best rates."""
        return sum(each.count * self.seconds[replace(each, count=1.0)] for each in products)


def _measured(product: Product, device: str, dtype: torch.dtype) -> float:
    """The best of each layout of the operands, after one to warm up; into memory already at hand."""
    small = max(1, CACHED_BYTES // (4 * product.rows * product.columns)) if product.batch > 1 else 1
    batch = min(product.batch, small)
    rows, inner, columns = product.rows, product.inner, product.columns
    left, right, out = (
        random_operand((batch, *size), dtype, device)
        for size in ((rows, inner), (columns, inner), (rows, columns))
    )
    right = right.mT
    # As a layer's forward pass has them; as its gradient's by the input; as its gradient's by the weight.
    layouts = [(left, right), (left, right.contiguous()), (left.mT.contiguous().mT, right.contiguous())]
    seconds = []
    for a, b in (layouts[0], *layouts, layouts[0]):
        start = _now(device)
        if batch == 1:
            torch.mm(a[0], b[0], out=out[0])
        else:
            torch.bmm(a, b, out=out)
        seconds.append(_now(device) - start)
    return min(seconds[1:]) * product.batch / batch


def measured_bandwidth(device: str = "cpu", elements: int = 2**26) -> float:
    """Bytes/s that fp32 numbers are streamed at: the best of reading, of changing in place and of a copy."""
    source, target = torch.ones(elements, device=device), torch.ones(elements, device=device)
    streams: list[tuple[int, Callable[[], torch.Tensor]]] = [
        (4, lambda: source.sum()),
        (8, lambda: target.mul_(1.0)),
        (8, lambda: target.copy_(source)),
    ]
    rates = []
    for _ in range(3):
        for size, stream in streams:
            start = _now(device)
            stream()
            rates.append(size * elements / (_now(device) - start))
    return max(rates)


def _now(device: str) -> float:
    """Seconds, when the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()
