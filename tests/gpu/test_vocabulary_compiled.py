"""The Triton kernel of the losses over the vocabulary as binaries for GPUs that need not be here, in every form that it
is launched in; how to install Triton: tests/gpu/test_lamb_compiled.py."""

from __future__ import annotations

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiled, not interpreted", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from train.objective.vocabulary_triton import BLOCK, LAUNCH, _rows_kernel  # noqa: E402

FLOATS = ("temperature", "kd", "mlm", "mse")


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("gradient", ["fp32", "fp16", "bf16"])
def test_compiles_in_every_form(gradient: str, architecture: int) -> None:
    for taught in (True, False):
        constants = {"TAUGHT": taught, "BLOCK": BLOCK}
        kinds = {**dict.fromkeys(FLOATS, "fp32"), **dict.fromkeys(("vocabulary", "stride"), "i32")}
        kinds |= {"targets": "*i64", "gradient": f"*{gradient}", **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(
            fn=_rows_kernel,
            signature={name: kinds.get(name, "*fp32") for name in _rows_kernel.arg_names},
            constexprs={(_rows_kernel.arg_names.index(name),): value for name, value in constants.items()},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=LAUNCH)
        assert len(compiled.asm["cubin"]) > 0
