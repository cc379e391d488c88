"""A GPU whose tensors have a shape, a dtype and a device, but no values: and whatever the host would wait for on it.

What touches the GPU runs on torch's fake tensors, the rest of a program as ever. So a wrong device raises as it does on
a GPU, and what the host reads from there is noted with its stack. It gets back a number that it has copied there and
nobody has changed since. Others are made up, as after a sound step: fractions are 0.001, whole numbers 1, flags True,
any() of them False, and bytes, as which DeepSpeed's ranks share that a gradient overflowed, 0.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.paths import ROOT

aten: Any = torch.ops.aten
HERE = Path(__file__).parent
WAITING = {
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,  # without output_size
}
"""Operations whose result, or its shape, the host must know. All but the first have no fake form, and raise."""
IN_FP32 = {
    *(
        aten.exp.default,
        aten.exp_.default,
        aten.exp.out,
        aten.log.default,
        aten.log_.default,
        aten._log_softmax.default,
    ),
    *(aten.sum.default, aten.sum.dim_IntList, aten.mm.out, aten.addmm_.default, aten.bmm.out),
}
"""Operations that the losses and scores never make in half precision."""
LOSSES = ("train/objective", "train/evaluation")
ALARMS = {aten.any.default, aten.isnan.default, aten.isinf.default}


@dataclass(frozen=True)
class HostWait:
    kind: str
    """What waits, such as "item"; or one of IN_FP32 with its dtype."""
    stack: tuple[str, ...]
    """`file:function` of the project's frames and of DeepSpeed's, innermost first."""


class HostWaits:
    """Those since the last call of `taken`."""

    def __init__(self) -> None:
        self._found: list[HostWait] = []

    def note(self, kind: str) -> None:
        self._found.append(HostWait(kind, tuple(_frames(sys._getframe(1)))))

    def taken(self) -> list[HostWait]:
        found, self._found = self._found, []
        return found


def _frames(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "deepspeed" in path.parts:
            yield f"deepspeed/{path.name}:{frame.f_code.co_name}"
        elif path.is_relative_to(ROOT) and ".venv" not in path.parts and path.parent != HERE:
            yield f"{path.relative_to(ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back


def _caller() -> str:
    """The file, outside of torch, that asked for an operation; "" where it is none of the project's."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "torch" not in path.parts and path.parent != HERE:
            return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else ""
        frame = frame.f_back
    return ""


class _FakeTensors(FakeTensorMode):
    """For a torch that cannot make a tensor on a GPU even for a moment."""

    avoid_device_init = True

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)


class FakeGpu(TorchDispatchMode):
    """While it is entered, operations that touch a GPU are made on fake tensors."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits
        self._fake = _FakeTensors()

    def __enter__(self) -> Any:
        torch._C._set_only_lift_cpu_tensors(True)  # numbers reach the GPU as copies, which can be seen
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        asked = any(isinstance(each, torch.device) and each.type == "cuda" for each in leaves)
        if not asked and not any(isinstance(each, FakeTensor) for each in leaves):
            return func(*args, **kwargs)
        if _is_composite(func):
            with self:  # as they come under torch.inference_mode
                return func.decompose(*args, **kwargs)
        on_gpu = any(isinstance(each, torch.Tensor) and each.device.type == "cuda" for each in leaves)
        if on_gpu:
            self._note(func, args, kwargs)
        if func is aten._local_scalar_dense.default:
            return _made_up(args[0])
        if func is aten.index.Tensor and _has_mask(args[1]):
            return _as_if_all_were_true(args[0], args[1])
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            return args[0]  # the host's memory, which a GPU without values leaves as it is
        with self._fake:
            out = func(*args, **kwargs)
        if func in IN_FP32 and out.dtype in (torch.float16, torch.bfloat16) and _caller().startswith(LOSSES):
            self.waits.note(f"{func} in {out.dtype}")
        if func is aten._to_copy.default:
            self._note_copy(args[0], out, kwargs.get("non_blocking", False))
            if not isinstance(args[0], FakeTensor) and args[0].numel() == 1:
                out.known = args[0].item()
        elif func in ALARMS:
            out.known = False
        elif func._schema.is_mutable and func.namespace == "aten" and isinstance(args[0], FakeTensor):
            vars(args[0]).pop("known", None)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any) -> None:
        if func is aten._local_scalar_dense.default:
            self.waits.note("item")
        elif func in WAITING and kwargs.get("output_size") is None:
            self.waits.note(str(func))
        elif func is aten.index.Tensor and _has_mask(args[1]):
            self.waits.note("boolean index")
        elif func in (aten.index_put_.default, aten.index_put.default):
            self._note_assignment(*args[1:3])
        elif func is aten.copy_.default:
            self._note_copy(args[1], args[0], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))

    def _note_copy(self, source: torch.Tensor, target: torch.Tensor, non_blocking: bool) -> None:
        """Copies between host and GPU wait unless they need not and the host's memory is page-locked."""
        kinds = source.device.type, target.device.type
        if kinds in (("cpu", "cuda"), ("cuda", "cpu")):
            host = source if kinds[0] == "cpu" else target
            if not non_blocking or isinstance(host, FakeTensor) or not host.is_pinned():
                self.waits.note("copy to the GPU" if kinds[0] == "cpu" else "copy from the GPU")

    def _note_assignment(self, indices: Sequence[torch.Tensor | None], value: torch.Tensor) -> None:
        of_host = value.numel() == 1 and value.device.type == "cpu"
        if _has_mask(indices):
            if (
                not of_host or len([each for each in indices if each is not None]) > 1
            ):  # else it is a masked_fill
                self.waits.note("boolean index")
        elif of_host:
            self.waits.note("copy to the GPU")


@functools.cache
def _is_composite(func: Any) -> bool:
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )


def _has_mask(indices: Sequence[torch.Tensor | None]) -> bool:
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)


def _as_if_all_were_true(tensor: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> torch.Tensor:
    (mask,) = indices
    assert mask is not None
    return tensor.flatten(0, mask.ndim - 1).clone()


def _made_up(tensor: torch.Tensor) -> bool | int | float:
    if tensor.dtype.is_floating_point:
        otherwise: bool | int | float = 0.001
    else:
        otherwise = True if tensor.dtype == torch.bool else int(tensor.dtype != torch.uint8)
    return getattr(tensor, "known", otherwise)  # type: ignore[no-any-return]
