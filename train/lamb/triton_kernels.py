"""The two passes as Triton kernels, for CUDA: one launch per pass over all tensors, whatever their number.

NOT YET RUN ON A GPU. Triton 3.9's interpreter has run the kernels on a CPU, against the reference
(tests/gpu/test_lamb_cuda.py); its compiler makes binaries of them for sm_80 and sm_90, in which all divisions, roots
and fused multiply-adds are the correctly rounded ones (tests/gpu/test_lamb_compiled.py). Their speed is unmeasured.

Every fragment of a tensor is a row of addresses and scalars, which go to the device in one small asynchronous
copy; every program takes one block of one fragment. No atomics: each block writes its own fp64 sums, and a second
small kernel adds those of a tensor in a fixed order. Nothing waits for the device.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from .parameters import TensorRule
from .update import Buffers, Coefficients, Kernel, fragments_of
from .zero_layout import Fragment

BLOCK = 4096
SUM_BLOCK = 1024
# Contraction would round unlike the eager kernel; the fused multiply-adds meant are written out.
LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def _direction(p, m, v, stretch, shift, decay):
    """m / (stretch sqrt(v) + shift) + decay p, correctly rounded throughout."""
    return tl.fma(decay, p, tl.div_rn(m, tl.fma(stretch, tl.sqrt_rn(v), shift)))


@triton.jit
def _block(rows, scalars, blocks, BLOCK: tl.constexpr):
    """This program's row, its scalars, and its offsets into the fragment with their mask."""
    program = tl.program_id(0)
    fragment = tl.load(blocks + 2 * program).to(tl.int64)
    row = rows + fragment * 6
    offsets = tl.load(blocks + 2 * program + 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, scalars + fragment * 8, offsets, offsets < tl.load(row + 4)


@triton.jit
def _first_kernel(rows, scalars, blocks, partial, BLOCK: tl.constexpr, grad_norm, NORMALIZE: tl.constexpr):
    row, scalar, offsets, inside = _block(rows, scalars, blocks, BLOCK)
    p_at = tl.load(row).to(tl.pointer_type(tl.float32)) + offsets
    g_at = tl.load(row + 1).to(tl.pointer_type(tl.float32)) + offsets
    m_at = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + offsets
    v_at = tl.load(row + 3).to(tl.pointer_type(tl.float32)) + offsets
    p = tl.load(p_at, mask=inside, other=0.0)
    g = tl.load(g_at, mask=inside, other=0.0)
    m = tl.load(m_at, mask=inside, other=0.0)
    v = tl.load(v_at, mask=inside, other=0.0)
    if NORMALIZE:
        g = tl.div_rn(g, g * 0.0 + tl.load(grad_norm))
    # torch's lerp, whose accurate form depends on which end is nearer.
    weight = tl.load(scalar) + p * 0.0
    m = tl.where(weight < 0.5, tl.fma(weight, g - m, m), tl.fma(weight - 1.0, g - m, g))
    v = tl.fma(tl.load(scalar + 2) * g, g, v * tl.load(scalar + 1))
    tl.store(m_at, m, mask=inside)
    tl.store(v_at, v, mask=inside)
    zeros = p * 0.0
    u = _direction(
        p, m, v, tl.load(scalar + 3) + zeros, tl.load(scalar + 4) + zeros, tl.load(scalar + 5) + zeros
    )
    wide_p = p.to(tl.float64)
    wide_u = u.to(tl.float64)
    program = tl.program_id(0)
    tl.store(partial + 2 * program, tl.sum(wide_p * wide_p, 0))
    tl.store(partial + 2 * program + 1, tl.sum(wide_u * wide_u, 0))


@triton.jit
def _sum_kernel(partial, spans, rows, sums, SUM_BLOCK: tl.constexpr):
    """Write the block sums of one fragment, added in order, as its tensor's row of `sums`.

    A rank holds at most one fragment of a tensor, and `sums` is 0 before: writing is adding.
    """
    fragment = tl.program_id(0)
    first = tl.load(spans + fragment)
    stop = tl.load(spans + fragment + 1)
    total_p = tl.zeros((SUM_BLOCK,), dtype=tl.float64)
    total_u = tl.zeros((SUM_BLOCK,), dtype=tl.float64)
    for start in range(first, stop, SUM_BLOCK):
        index = start + tl.arange(0, SUM_BLOCK)
        inside = index < stop
        total_p += tl.load(partial + 2 * index, mask=inside, other=0.0)
        total_u += tl.load(partial + 2 * index + 1, mask=inside, other=0.0)
    tensor = tl.load(rows + fragment * 6 + 5)
    tl.store(sums + 2 * tensor, tl.sum(total_p, 0))
    tl.store(sums + 2 * tensor + 1, tl.sum(total_u, 0))


@triton.jit
def _second_kernel(rows, scalars, blocks, ratios, BLOCK: tl.constexpr):
    row, scalar, offsets, inside = _block(rows, scalars, blocks, BLOCK)
    p_at = tl.load(row).to(tl.pointer_type(tl.float32)) + offsets
    p = tl.load(p_at, mask=inside, other=0.0)
    m = tl.load(tl.load(row + 2).to(tl.pointer_type(tl.float32)) + offsets, mask=inside, other=0.0)
    v = tl.load(tl.load(row + 3).to(tl.pointer_type(tl.float32)) + offsets, mask=inside, other=0.0)
    zeros = p * 0.0
    u = _direction(
        p, m, v, tl.load(scalar + 3) + zeros, tl.load(scalar + 4) + zeros, tl.load(scalar + 5) + zeros
    )
    factor = tl.load(scalar + 6) * tl.load(ratios + tl.load(row + 5)) + zeros
    tl.store(p_at, tl.fma(-factor, u, p), mask=inside)


def started_kernel(device: torch.device) -> TritonKernel:
    """A kernel whose every launch has been tried: Triton compiles its driver and the kernels at the first one, with a C
    compiler and Python's headers, into a folder that it keeps.

    Raises:
        Exception: whatever Triton, the compilers or the driver raise.
    """
    kernel, rules = TritonKernel(), [TensorRule("", decay=True, adapt=True)]
    p, g, m, v = torch.ones(4, BLOCK, device=device).unbind()
    c = Coefficients(beta1=0.9, beta2=0.9, stretch=1.0, shift=1.0, weight_decay=0.1, step_size=0.1)
    buffers = [Buffers(p, g, m, v, (Fragment(0, 0, BLOCK),), c)]
    sums = torch.zeros(1, 2, dtype=torch.float64, device=device)
    for grad_norm in (None, torch.ones((), device=device)):
        kernel.first_pass(buffers, rules, sums, grad_norm)
    kernel.second_pass(buffers, rules, torch.ones(1, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return kernel


class TritonKernel(Kernel):
    """Both passes over fp32 tensors on one device."""

    name = "triton"

    def __init__(self) -> None:
        self._sizes: tuple[int, ...] = ()
        self._blocks = self._spans = self._rows = self._scalars = torch.empty(0)

    def first_pass(
        self,
        buffers: Sequence[Buffers],
        rules: Sequence[TensorRule],
        sums: torch.Tensor,
        grad_norm: torch.Tensor | None,
    ) -> None:
        self._describe(buffers, rules)
        if not self._sizes:
            return
        blocks = self._blocks.shape[0]
        partial = torch.empty(blocks, 2, dtype=torch.float64, device=sums.device)
        norm = self._scalars if grad_norm is None else grad_norm
        with _launching_on(sums.device):
            _first_kernel[(blocks,)](
                self._rows, self._scalars, self._blocks, partial, BLOCK, norm, grad_norm is not None, **LAUNCH
            )
            _sum_kernel[(len(self._sizes),)](partial, self._spans, self._rows, sums, SUM_BLOCK)

    def second_pass(
        self, buffers: Sequence[Buffers], rules: Sequence[TensorRule], ratios: torch.Tensor
    ) -> None:
        """Uses the description that the first pass made of the same buffers."""
        if self._sizes:
            grid = (self._blocks.shape[0],)
            with _launching_on(ratios.device):
                _second_kernel[grid](self._rows, self._scalars, self._blocks, ratios, BLOCK, **LAUNCH)

    def _describe(self, buffers: Sequence[Buffers], rules: Sequence[TensorRule]) -> None:
        """Put on the device: addresses and scalars of every fragment, and, when sizes change, its blocks."""
        device = buffers[0].p.device
        rows, scalars = [], []
        for one, fragment, _, c in fragments_of(buffers, rules):
            at = 4 * fragment.start
            addresses = [x.data_ptr() + at for x in (one.p, one.g, one.m, one.v)]
            rows.append([*addresses, fragment.stop - fragment.start, fragment.tensor])
            scalars.append(
                [1 - c.beta1, c.beta2, 1 - c.beta2, c.stretch, c.shift, c.weight_decay, c.step_size, 0.0]
            )
        self._rows = _to_device(torch.tensor(rows, dtype=torch.int64), device)
        self._scalars = _to_device(torch.tensor(scalars, dtype=torch.float32), device)
        sizes = tuple(row[4] for row in rows)
        if sizes != self._sizes:
            self._sizes = sizes
            counts = torch.tensor([-(-size // BLOCK) for size in sizes], dtype=torch.int64)
            spans = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
            fragment_of_block = torch.repeat_interleave(torch.arange(len(sizes)), counts)
            place = torch.arange(int(spans[-1])) - spans[fragment_of_block]
            self._spans = spans.to(torch.int32).to(device)
            self._blocks = torch.stack((fragment_of_block, place), 1).to(torch.int32).contiguous().to(device)


def _launching_on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _to_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)
