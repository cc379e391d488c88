"""Dropout on a CPU in a fifth of torch's time, equal to it bit for bit: masks, values, gradients, generator.

torch's takes 5 ns an element, nearly all of it for one random number after the other: a tenth of a small model's step.
Here the same numbers are drawn by the C loops of dropout.c. A processor or a torch on which these would draw others is
found out at first use, and torch's own dropout then stays; so it does without a C compiler, and on GPUs.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from train.lamb import compile_library, num_threads

SOURCE = Path(__file__).with_name("dropout.c")
DTYPES = {torch.float32: "dropout_fp32", torch.bfloat16: "dropout_bf16"}


def with_fast_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, its dropout modules done here from now on; parameters, names and what it computes stay as
    they are. Nothing is compiled before the first forward pass in training mode."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = FastDropout
    return model


class FastDropout(nn.Dropout):
    """nn.Dropout, by `dropout`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return dropout(input, self.p) if self.training else input


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """torch.nn.functional.dropout(x, p): of any shape, dtype and device."""
    fast = 0 < p < 1 and x.device.type == "cpu" and x.dtype in DTYPES and x.is_contiguous()
    if not fast or torch.compiler.is_compiling() or (loops := build()) is None:
        return functional.dropout(x, p)
    return _Dropout.apply(x, p, loops)


@functools.cache
def build() -> ctypes.CDLL | None:
    """The compiled loops; None where there is no compiler, or torch draws its masks otherwise."""
    of_mask = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p)
    of_values = (*(ctypes.c_void_p,) * 3, ctypes.c_int64, ctypes.c_float, ctypes.c_int)
    library = compile_library(SOURCE, {"dropout_mask": of_mask, **dict.fromkeys(DTYPES.values(), of_values)})
    return library if library is not None and _draws_as_torch(library) else None


def _draws_as_torch(library: ctypes.CDLL) -> bool:
    """Whether both give one mask and leave the generator in one state; this process's own generator is not touched."""
    theirs, ours = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for count in (1000, 7):
        expected = torch.empty(count).bernoulli_(0.9, generator=theirs)
        if not torch.equal(_mask(library, (count,), 0.1, ours), expected.to(torch.uint8)):
            return False
    return torch.equal(theirs.get_state(), ours.get_state())


def _mask(library: ctypes.CDLL, shape: tuple[int, ...], p: float, generator: torch.Generator) -> torch.Tensor:
    """uint8, 1 for what stays."""
    keep = torch.empty(shape, dtype=torch.uint8)
    state = generator.get_state()
    library.dropout_mask(state.data_ptr(), keep.numel(), math.ceil((1 - p) * 2**53), keep.data_ptr())
    generator.set_state(state)
    return keep


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float, library: ctypes.CDLL) -> torch.Tensor:
        ctx.keep, ctx.library = _mask(library, x.shape, p, torch.default_generator), library
        # As torch rounds it: of the tensor's own dtype.
        ctx.scale = float(torch.ones((), dtype=x.dtype).div_(1 - p))
        return _scaled(x, ctx.keep, ctx.scale, library)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _scaled(grad.contiguous(), ctx.keep, ctx.scale, ctx.library), None, None


def _scaled(x: torch.Tensor, keep: torch.Tensor, scale: float, library: ctypes.CDLL) -> torch.Tensor:
    out = torch.empty_like(x)
    pointers = (tensor.data_ptr() for tensor in (x, keep, out))
    getattr(library, DTYPES[x.dtype])(*pointers, x.numel(), scale, num_threads())
    return out
