"""The Triton kernels against the eager passes and the reference, on a GPU.

Without one, the same tests run on a CPU in Triton's interpreter, where Triton 3.9 or later is installed (before, it
rounded a fused multiply-add twice): `TRITON_INTERPRET=1 python -m pytest tests/gpu/test_lamb_cuda.py`.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.lamb_checks import BoundedReference, make_gradients, make_parameters, worst_error
from train.lamb import Lamb

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.gpu
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
    pytest.skip("Triton's interpreter is exact since 3.9", allow_module_level=True)
if not torch.cuda.is_available() and not INTERPRETED:
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)


@pytest.fixture(autouse=True)
def triton_where_it_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, fused=True means the C loops; here it shall mean Triton."""
    if DEVICE == "cpu":
        from train.lamb import optimizer as lamb_optimizer
        from train.lamb.triton_kernels import TritonKernel

        monkeypatch.setattr(lamb_optimizer, "_fused_kernel", lambda device, dtype: TritonKernel())


@pytest.mark.parametrize("fused", [True, False], ids=["triton", "eager"])
@pytest.mark.parametrize(
    "options",
    [{}, {"adapt_all": True}, {"prenormalize": True}, {"mode": "deepspeed"}, {"betas": (0.5, 0.9)}],
    ids=str,
)
def test_agrees_with_the_reference(options: dict[str, Any], fused: bool) -> None:
    made = {**make_parameters(), "long.weight": torch.nn.Parameter(torch.full((3, 3001), 0.02))}
    parameters = {name: torch.nn.Parameter(p.detach().to(DEVICE)) for name, p in made.items()}
    optimizer = Lamb(parameters.items(), lr=0.01, fused=fused, **options)
    reference = BoundedReference(made, 0.01, **options)
    for step in range(3):
        gradients = {**make_gradients(step), "long.weight": torch.linspace(-1, 1, 9003).view(3, 3001)}
        bounds, _ = reference.step_from({name: p.detach().cpu() for name, p in parameters.items()}, gradients)
        for name, p in parameters.items():
            p.grad = gradients[name].to(DEVICE)
        optimizer.step()
        assert worst_error(parameters, reference, bounds) <= 1
    assert optimizer.kernel == ("triton" if fused else "eager")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_another_device_than_the_current_one() -> None:
    outcomes = []
    for device in ("cuda:0", "cuda:1"):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 9003, device=device).view(3, 3001))
        weight.grad = torch.ones_like(weight)
        optimizer = Lamb([("weight", weight)], lr=0.01, fused=True)
        optimizer.step()
        assert optimizer.kernel == "triton"
        outcomes.append(weight.detach().cpu())
    assert torch.equal(*outcomes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_host_synchronisation() -> None:
    parameters = {name: torch.nn.Parameter(p.detach().to(DEVICE)) for name, p in make_parameters().items()}
    optimizer = Lamb(parameters.items(), lr=0.01, fused=True)
    for name, gradient in make_gradients(3).items():
        parameters[name].grad = gradient.to(DEVICE)
    optimizer.step()
    assert optimizer.kernel == "triton"
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
