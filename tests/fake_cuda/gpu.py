"""Stand-ins for what torch.cuda and torch.distributed ask of a driver, of NCCL and of other ranks."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # which takes stock of torch.cuda's functions: before they are replaced
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.fake_cuda.host_waits import HostWaits
from train.distributed.world import World

WORLD = World(rank=3, local_rank=1, world_size=4, local_size=2, device="cuda:1")
"""This process among the others, and not the first GPU: what takes any other device is noticed."""
ENVIRONMENT = {
    "RANK": str(WORLD.rank),
    "LOCAL_RANK": str(WORLD.local_rank),
    "WORLD_SIZE": str(WORLD.world_size),
    "DS_ACCELERATOR": "cuda",
}
MEMORY_BYTES = 80 * 2**30


def install() -> HostWaits:
    """Put them in place for the rest of this process; what they wait for is noted."""
    waits = HostWaits()
    cuda: Any = torch.cuda
    for name, stand_in in {**_device(waits), **_streams(waits)}.items():
        setattr(cuda, name, stand_in)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _nothing
    tensor: Any = torch.Tensor
    tensor.record_stream = _nothing
    tensor.data_ptr = _address
    nn.Module._apply = _apply  # type: ignore[method-assign]
    torch.cuda.set_device(WORLD.device)
    _join_ranks(waits)
    return waits


def _join_ranks(waits: HostWaits) -> None:
    """A process group in which every collective returns at once. Objects are as if all ranks sent this one's."""
    dist.init_process_group("fake", store=FakeStore(), rank=WORLD.rank, world_size=WORLD.world_size)

    def all_gather_object(objects: list[Any], own: Any, group: Any = None) -> None:
        waits.note("all_gather_object")
        objects[:] = [own] * len(objects)

    distributed: Any = dist
    distributed.all_gather_object = all_gather_object
    distributed.broadcast_object_list = _waiting(waits, "broadcast_object_list")
    distributed.barrier = _waiting(waits, "barrier")


def _nothing(*_: Any, **__: Any) -> None: ...


def _waiting(waits: HostWaits, name: str, result: Any = None) -> Any:
    def called(*_: Any, **__: Any) -> Any:
        waits.note(name)
        return result

    return called


def _device(waits: HostWaits) -> dict[str, Any]:
    properties = SimpleNamespace(total_memory=MEMORY_BYTES, major=9, minor=0, name="fake", uuid="fake")
    used = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": _nothing,
        "device_count": lambda: WORLD.local_size,
        "current_device": torch.accelerator.current_device_index,
        "set_device": lambda device: torch.accelerator.set_device_index(_number(device)),
        "device": lambda device: torch.accelerator.device_index(_number(device)),
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (properties.major, properties.minor),
        "get_device_name": lambda *_: properties.name,
        "is_bf16_supported": lambda *_: True,
        "is_current_stream_capturing": lambda: False,
        "mem_get_info": lambda *_: (MEMORY_BYTES, MEMORY_BYTES),
        **dict.fromkeys(used, lambda *_: 0),
        **{name: _waiting(waits, name) for name in ("reset_peak_memory_stats", "empty_cache")},
        "synchronize": _waiting(waits, "synchronize"),
        "manual_seed_all": _nothing,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": _nothing,
    }


def _number(device: Any) -> int:
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return torch.accelerator.current_device_index() if index is None else index


def _streams(waits: HostWaits) -> dict[str, Any]:
    class Stream(contextlib.nullcontext):  # type: ignore[type-arg]
        device = property(lambda self: torch.device("cuda", torch.accelerator.current_device_index()))
        wait_stream = wait_event = _nothing
        synchronize = _waiting(waits, "stream.synchronize")

        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__(self)

        def record_event(self, event: Any = None) -> Any:
            return event or Event()

    class Event:
        record = wait = _nothing
        synchronize = _waiting(waits, "event.synchronize")
        elapsed_time = _waiting(waits, "event.elapsed_time", 1.0)

        def __init__(self, *_: Any, **__: Any) -> None: ...

    only = Stream()
    current = dict.fromkeys(("current_stream", "default_stream"), lambda *_: only)
    return {"Stream": Stream, "Event": Event, "stream": lambda stream: stream, **current}


_real_address = torch.Tensor.data_ptr


def _address(tensor: torch.Tensor) -> int:
    """Of memory that a fake tensor does not have: different for different storages, and never read."""
    if not isinstance(tensor, FakeTensor):
        return _real_address(tensor)
    return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()


def _apply(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """What Module.to, half and the like do. torch's own refuses fake tensors that are tied or known to a fake mode."""
    done: set[int] = set()
    for each in module.modules() if recurse else [module]:
        for parameter in each._parameters.values():
            if parameter is not None and id(parameter) not in done:
                done.add(id(parameter))
                with torch.no_grad():
                    moved = nn.Parameter(fn(parameter), requires_grad=parameter.requires_grad)
                # The object stays the one that an optimizer holds.
                torch._C._swap_tensor_impl(parameter, moved)
                parameter.__class__, moved.__class__ = moved.__class__, parameter.__class__
                parameter.__dict__, moved.__dict__ = moved.__dict__, parameter.__dict__
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = fn(buffer)
    return module
