"""The Triton kernels as binaries for GPUs that need not be here: wherever Triton is installed, without a driver.

It is not among the requirements, as its wheel unpacks to 1 GB. On a machine without a GPU:

    python -m venv --system-site-packages /tmp/triton && /tmp/triton/bin/pip install triton==3.9.0
    export PYTHONPATH=.venv/lib/python3.11/site-packages
    /tmp/triton/bin/python -m pytest tests/gpu/test_lamb_compiled.py
    TRITON_INTERPRET=1 /tmp/triton/bin/python -m pytest tests/gpu/test_lamb_cuda.py
"""

from __future__ import annotations

import os
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiled, not interpreted", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from train.lamb import triton_kernels  # noqa: E402

POINTERS = {
    "rows": "*i64",
    "scalars": "*fp32",
    "blocks": "*i32",
    "spans": "*i32",
    "ratios": "*fp32",
    "partial": "*fp64",
    "sums": "*fp64",
    "grad_norm": "*fp32",
}
BLOCK = {"BLOCK": triton_kernels.BLOCK}
KERNELS: dict[str, tuple[str, dict[str, Any]]] = {
    "first": ("_first_kernel", {**BLOCK, "NORMALIZE": False}),
    "first, pre-normalised": ("_first_kernel", {**BLOCK, "NORMALIZE": True}),
    "sums": ("_sum_kernel", {"SUM_BLOCK": triton_kernels.SUM_BLOCK}),
    "second": ("_second_kernel", BLOCK),
}


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_to_correctly_rounded_operations(name: str, architecture: int) -> None:
    function, constants = KERNELS[name]
    kernel = getattr(triton_kernels, function)
    source = ASTSource(
        fn=kernel,
        signature={each: "constexpr" if each in constants else POINTERS[each] for each in kernel.arg_names},
        constexprs={(kernel.arg_names.index(each),): value for each, value in constants.items()},
    )
    options = triton_kernels.LAUNCH if function != "_sum_kernel" else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert len(compiled.asm["cubin"]) > 0
    code = compiled.asm["ptx"]
    assert "approx" not in code
    assert "div.full" not in code
    if function != "_sum_kernel":
        assert {"fma.rn.f32", "div.rn.f32", "sqrt.rn.f32"} <= set(code.split())
