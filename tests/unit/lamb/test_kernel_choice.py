"""Which kernel LAMB takes where Triton is there and cannot launch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from train.lamb.optimizer import choose_kernel

GPU = (torch.device("cuda", 0), torch.float32)


class Function:
    """A jitted function that cannot be launched, as Triton's without a C compiler."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

        return launch


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """train.lamb.triton_kernels with a Triton that imports."""
    triton = ModuleType("triton")
    triton.jit = Function  # type: ignore[attr-defined]
    triton.language = ModuleType("triton.language")  # type: ignore[attr-defined]
    triton.language.constexpr = int  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setitem(sys.modules, "triton.language", triton.language)  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "train.lamb.triton_kernels", raising=False)
    import train.lamb.triton_kernels as made

    return made


@pytest.mark.parametrize("launched", ["_first_kernel", "_sum_kernel", "_second_kernel"])
def test_every_launch_is_tried(launched: str, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    for name in ("_first_kernel", "_sum_kernel", "_second_kernel"):
        if name != launched:
            works = {(1,): lambda *args, name=name, **options: names.append(name)}
            monkeypatch.setattr(kernels, name, works)
    with pytest.raises(RuntimeError, match="Failed to find C compiler"):
        kernels.started_kernel(torch.device("cpu"))
    assert launched not in names


def test_a_triton_that_cannot_launch_falls_back(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the ranks agree: a rank that has found out at its first step would leave the others waiting."""
    trial = kernels.started_kernel
    monkeypatch.setattr(kernels, "started_kernel", lambda device: trial(torch.device("cpu")))
    agreed: list[bool] = []

    def on_all_ranks(here: bool) -> bool:
        agreed.append(here)
        return here

    with pytest.warns(UserWarning, match=r"Triton cannot start .*Failed to find C compiler.*python3-dev"):
        assert choose_kernel(None, GPU, on_all_ranks).name == "eager"
    assert agreed == [False]
    with (
        pytest.warns(UserWarning, match="Triton cannot start"),
        pytest.raises(
            ValueError, match=r"fused=True, but there is no fused LAMB .*on CUDA Triton and Python's headers"
        ),
    ):
        choose_kernel(True, GPU)
    assert choose_kernel(False, GPU).name == "eager"
