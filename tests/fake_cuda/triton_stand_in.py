"""Triton as the host sees it: kernels that look at what they are launched with, and compute nothing."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}


def import_kernels() -> list[str]:
    """Import the modules of Triton kernels with stand-ins for Triton, which need not be installed.

    Returns:
        The list to which every launch appends its kernel's name.
    """
    launches: list[str] = []
    triton, language = ModuleType("triton"), ModuleType("triton.language")

    def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        return _Kernel(function, launches) if function else jit

    vars(triton).update(jit=jit, language=language)
    own = {"triton": triton, "triton.language": language}
    before = {name: sys.modules[name] for name in own if name in sys.modules}
    sys.modules.update(own)
    try:
        import train.lamb.triton_kernels  # noqa: F401
        from train.objective import vocabulary_triton
    finally:
        for name in own:
            del sys.modules[name]
        sys.modules.update(before)
    vocabulary_triton.deviation = lambda device: 0.0  # of results that fake tensors do not have
    return launches


@dataclass
class _Kernel:
    function: Callable[..., Any]
    launches: list[str]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(isinstance(size, int) and 0 < size < 2**31 for size in grid), grid

        def launch(*args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in OPTIONS & kwargs.keys()}
            inspect.signature(self.function).bind(*args, **kwargs)
            current = torch.device("cuda", torch.cuda.current_device())
            for each in (*args, *kwargs.values(), *options.values()):
                if isinstance(each, torch.Tensor):
                    assert each.device == current, f"{each.device} where {current} launches"
                    assert each.is_contiguous()
            self.launches.append(self.function.__name__)

        return launch
