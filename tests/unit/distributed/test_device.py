"""Which device each rank gets, and that DeepSpeed's own code takes the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed.runtime.engine
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from tests.nvidia_smi import A100, stand_in
from tests.unit.distributed.test_world import HYDRA, OPEN_MPI, SRUN, TORCH
from train.distributed.device import device_of, engine_arguments, gpus_of_driver, kind_of_device, unused_gpus
from train.distributed.discovery import discover_ranks
from train.distributed.rendezvous import free_port
from train.distributed.store import compare_devices, compare_versions, join_store
from train.errors import RankError, ReportedElsewhereError, UserError

# Every launcher starts local rank 1 of 4.
LAUNCHERS = {
    "deepspeed": TORCH | {"CROSS_RANK": "1"},
    "torchrun": TORCH | {"TORCHELASTIC_RUN_ID": "none"},
    "by hand": TORCH,
    "srun": SRUN,
    "Open MPI": OPEN_MPI,
    "MPICH": HYDRA,
    "srun, and torch's variables": SRUN | TORCH,
    "Open MPI, and torch's variables": OPEN_MPI | TORCH,
    "none": {},
}
BINDING = [name for name in LAUNCHERS if "srun" in name or "MPI" in name]


def place(environment: dict[str, str], num_visible: int) -> str:
    return device_of(discover_ranks(environment), environment, num_visible, "n1")


def device_of_engine(device: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the installed DeepSpeed puts an engine, by its own code, after `join_world` has set the variables."""
    ranks = discover_ranks(environment)
    kind, _, number = device.partition(":")
    monkeypatch.setattr(os, "environ", {**environment, "LOCAL_RANK": str(ranks.local_rank)})
    taken: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    module = deepspeed.runtime.engine
    accelerator = CPU_Accelerator() if kind == "cpu" else CUDA_Accelerator()
    monkeypatch.setattr(module, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(module, "dist", SimpleNamespace(get_world_size=lambda: 8, get_rank=lambda: 5))
    engine: Any = SimpleNamespace(global_rank=5)
    arguments = engine_arguments(device)
    made = module.DeepSpeedEngine
    made._do_args_sanity_check(engine, arguments)
    made._configure_with_arguments(engine, arguments, None)
    made._set_distributed_vars(engine, arguments)
    assert taken == ([] if kind == "cpu" else [int(number)])
    return str(engine.device)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    ("num_visible", "variables", "expected"),
    [
        (0, {}, "cpu"),
        (0, {"DS_ACCELERATOR": "cpu"}, "cpu"),
        (4, {}, "cuda:1"),
        (4, {"DS_ACCELERATOR": ""}, "cuda:1"),
        (4, {"DS_ACCELERATOR": "cuda"}, "cuda:1"),
        (4, {"DS_ACCELERATOR": "cpu"}, "cpu"),
        (1, {"DS_ACCELERATOR": "cpu"}, "cpu"),
        (1, {}, "cuda:0"),
        (1, {"CUDA_VISIBLE_DEVICES": "3"}, "cuda:0"),
        (2, {}, "cuda:1"),
    ],
)
def test_the_engine_is_where_the_teacher_is(
    launcher: str, num_visible: int, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = LAUNCHERS[launcher] | variables
    if launcher == "none":
        expected = expected.replace("cuda:1", "cuda:0")
    elif expected == "cuda:0" and launcher not in BINDING:
        with pytest.raises(
            RankError, match=r"4 ranks on n1, but local rank 1 sees only 1 GPUs: start one rank"
        ):
            place(environment, num_visible)
        return
    device = place(environment, num_visible)
    assert device == expected
    assert device_of_engine(device, environment, monkeypatch) == device


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "by hand"])
def test_a_wrapper_may_show_each_rank_its_own_gpu(launcher: str) -> None:
    """torchrun --virtual-local-rank does."""
    assert place(LAUNCHERS[launcher] | {"LOCAL_RANK": "0"}, 1) == "cuda:0"


@pytest.mark.parametrize("launcher", [name for name in LAUNCHERS if name != "none"])
def test_more_ranks_than_gpus(launcher: str) -> None:
    names = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
    environment = LAUNCHERS[launcher] | {name: "3" for name in names if name in LAUNCHERS[launcher]}
    with pytest.raises(
        RankError, match=r"4 ranks on n1, but local rank 3 sees only 2 GPUs.*--gpus-per-task=1"
    ):
        place(environment, 2)


@pytest.mark.parametrize(
    ("asked", "num_visible", "message"),
    [
        ("cuda", 0, "DS_ACCELERATOR=cuda, but torch sees no GPU here"),
        ("xpu", 0, "DS_ACCELERATOR=xpu: this program runs on cuda and cpu"),
        ("CPU", 4, "DS_ACCELERATOR=CPU: this program"),
    ],
)
def test_a_device_that_is_not_here(asked: str, num_visible: int, message: str) -> None:
    with pytest.raises(RankError, match=message):
        kind_of_device({"DS_ACCELERATOR": asked}, num_visible)


def outcomes_of_three(act: Callable[[dist.Store, int], None]) -> list[BaseException | None]:
    """What becomes of `act` with the joined store and the number of each of three ranks."""
    port, stores = free_port(), []

    def join(rank: int) -> None:
        stores.append(join_store(rank, 3, "127.0.0.1", port, 20))  # rank 0's must outlive the others
        act(stores[-1], rank)

    with ThreadPoolExecutor() as pool:
        return [one.exception() for one in [pool.submit(join, rank) for rank in range(3)]]


@pytest.mark.parametrize("package", ["python", "deepspeed"])
def test_ranks_compare_their_versions(package: str) -> None:
    versions = {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8"}
    same = outcomes_of_three(lambda store, rank: compare_versions(store, rank, 3, versions))
    assert same == [None] * 3
    errors = outcomes_of_three(
        lambda store, rank: compare_versions(
            store, rank, 3, {**versions, package: "9"} if rank == 2 else versions
        )
    )
    assert [type(error) for error in errors] == [UserError, *2 * [ReportedElsewhereError]]
    with pytest.raises(
        UserError, match=rf"{package}: rank 2 on \S+ has 9, rank 0 on \S+ has {versions[package]}$"
    ):
        raise errors[0]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (["cpu", "cpu", "cpu"], None),
        (["cuda a", "cuda b", "cuda c"], None),
        (
            ["cuda a", "cuda b", "cuda b"],
            r"ranks 1 and 2 on \S+ have the same GPU \(b\): start one rank per GPU",
        ),
        (
            ["cuda a", "cpu", "cuda b"],
            r"rank 1 on \S+ computes on the CPU, rank 0 on \S+ on a GPU: run launch/d",
        ),
    ],
)
def test_ranks_compare_their_devices(devices: list[str], message: str | None) -> None:
    def compare(store: dist.Store, rank: int) -> None:
        kind, _, uuid = devices[rank].partition(" ")
        compare_devices(store, rank, 3, kind, uuid)

    errors = outcomes_of_three(compare)
    if message is None:
        assert errors == [None] * 3
        return
    assert [type(error) for error in errors] == [UserError, *2 * [ReportedElsewhereError]]
    with pytest.raises(UserError, match=message):
        raise errors[0]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("script", "variables", "said"),
    [
        (f"{A100}\n{A100}", {}, "nvidia-smi shows 2 x NVIDIA A100-SXM4-80GB, driver 550.54.15, but torch"),
        ("echo has failed; exit 9", {}, "nvidia-smi ends with code 9: has failed, but torch"),
        ("echo No devices were found; exit 6", {}, None),
        (A100, {"DS_ACCELERATOR": "cpu"}, None),
        (A100, {"CUDA_VISIBLE_DEVICES": ""}, None),
        (A100, {"CUDA_VISIBLE_DEVICES": "-1"}, None),
    ],
)
def test_gpus_that_torch_cannot_use_are_told(
    script: str, variables: dict[str, str], said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    stand_in(tmp_path, script)
    remark = unused_gpus(variables, "cpu")
    assert remark is None if said is None else remark is not None and remark.startswith(said)
    assert unused_gpus(variables, "cuda:0") is None


def test_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus_of_driver() == []
    assert unused_gpus({}, "cpu") is None
