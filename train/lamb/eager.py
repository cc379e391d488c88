"""The two passes in plain torch operations: the oracle of the fused kernels, and what runs without them.

On a CPU the elements go through in chunks that stay in the cores' caches, since each of the dozen operations
would otherwise travel to memory and back. A chunk is as many elements as torch's threads take at
32K-64K each: torch cuts an operation evenly among its threads, so that each core meets the same part of the
chunk in every operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .formula import Part, Passes, StepCoefficients, pieces_of
from .geometry import TensorRule

CHUNK_PER_THREAD = 65_536
"""Elements per core and operation: seven fp32 buffers of it are 1.8 MB, about one core's second-level cache."""


class EagerPasses(Passes):
    """Both passes over any device and dtype, with torch operations that round alike at any offset."""

    name = "eager"

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, ...]] = {}

    def first(
        self,
        parts: Sequence[Part],
        rules: Sequence[TensorRule],
        sums: torch.Tensor,
        grad_norm: torch.Tensor | None,
    ) -> None:
        for part, piece, rule, decay in pieces_of(parts, rules):
            for a, b, u, w, wide in self._chunks(part.p, piece.start, piece.stop):
                p, g, m, v = (x.view(-1)[a:b] for x in (part.p, part.g, part.m, part.v))
                if grad_norm is not None:
                    g = torch.div(g, grad_norm, out=w)
                m.lerp_(g, 1 - part.c.beta1)
                v.mul_(part.c.beta2).addcmul_(g, g, value=1 - part.c.beta2)
                if rule.adapt:
                    _direction(p, m, v, part.c, decay, u)
                    sums[piece.tensor, 0] += _sum_squares(p, wide)
                    sums[piece.tensor, 1] += _sum_squares(u, wide)

    def second(self, parts: Sequence[Part], rules: Sequence[TensorRule], ratios: torch.Tensor) -> None:
        for part, piece, _, decay in pieces_of(parts, rules):
            factor = (ratios[piece.tensor].double() * part.c.step_size).to(part.p.dtype)
            for a, b, u, _, _ in self._chunks(part.p, piece.start, piece.stop):
                p, m, v = (x.view(-1)[a:b] for x in (part.p, part.m, part.v))
                _direction(p, m, v, part.c, decay, u)
                p.addcmul_(u, factor, value=-1)

    def sum_squares(
        self, parts: Sequence[Part], rules: Sequence[TensorRule], device: torch.device
    ) -> torch.Tensor:
        """The sum of squares of all gradients on this rank: 0-dimensional fp64 on `device`."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        for part, piece, _, _ in pieces_of(parts, rules):
            for a, b, _, _, wide in self._chunks(part.g, piece.start, piece.stop):
                total += _sum_squares(part.g.view(-1)[a:b], wide)
        return total

    def _chunks(
        self, like: torch.Tensor, start: int, stop: int
    ) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Bounds of each chunk of [start, stop) with two buffers of its length and an fp64 one."""
        size = CHUNK_PER_THREAD * torch.get_num_threads() if like.device.type == "cpu" else stop - start
        key = (like.device, like.dtype)
        if key not in self._buffers or self._buffers[key][0].numel() < size:
            wide = torch.empty(size, dtype=torch.float64, device=like.device)
            self._buffers[key] = (like.new_empty(size), like.new_empty(size), wide)
        u, w, wide = self._buffers[key]
        for a in range(start, stop, size):
            b = min(a + size, stop)
            yield a, b, u[: b - a], w[: b - a], wide[: b - a]


def _direction(
    p: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    c: StepCoefficients,
    decay: float,
    u: torch.Tensor,
) -> torch.Tensor:
    """m / (stretch sqrt(v) + shift) + decay p, written to u."""
    # Where the processor has fused multiply-add, torch's add with alpha and addcmul round once.
    torch.sqrt(v, out=u)
    torch.add(u.new_full((), c.shift), u, alpha=c.stretch, out=u)
    torch.div(m, u, out=u)
    return u.add_(p, alpha=decay) if decay else u


def _sum_squares(x: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    # Squares of fp32 numbers are exact in fp64, so that only the additions round.
    wide.copy_(x)
    return torch.dot(wide, wide)
