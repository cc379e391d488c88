"""Which implementation of the two passes updates the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from train import lamb_native
from train.lamb_eager import EagerPasses
from train.lamb_geometry import TensorRule
from train.lamb_math import Part


class Passes(Protocol):
    """First pass: moments and sums of squares. Second: the update. See lamb_eager.EagerPasses."""

    name: str

    def first(
        self,
        parts: Sequence[Part],
        rules: Sequence[TensorRule],
        sums: torch.Tensor,
        grad_norm: torch.Tensor | None,
    ) -> None: ...

    def second(self, parts: Sequence[Part], rules: Sequence[TensorRule], ratios: torch.Tensor) -> None: ...


def choose_passes(fused: bool | None, device: str, dtype: torch.dtype) -> Passes:
    """The fastest passes for tensors of `dtype` on a device of type `device`.

    Args:
        fused: False for plain torch operations; True to insist on a fused kernel; None for one where it can be
            had.
    Raises:
        ValueError: True, and there is none here.
    """
    if fused is not False and dtype == torch.float32:
        if device == "cpu" and (library := lamb_native.build()) is not None:
            return lamb_native.NativePasses(library)
        if device == "cuda":
            try:
                from train.lamb_triton import TritonPasses
            except ImportError:
                pass
            else:
                return TritonPasses()
    if fused:
        raise ValueError(
            f"fused=True, but there is no fused LAMB for {dtype} on {device} here: it takes fp32 and a C "
            "compiler (CPU) or Triton (CUDA); leave fused at None for plain torch operations"
        )
    return EagerPasses()
