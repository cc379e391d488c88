"""Which device a rank computes on: one owner, for this program and for DeepSpeed. No torch here: the doctor asks too.

DeepSpeed 0.19 would choose for itself: the kind of device by DS_ACCELERATOR or by what it finds (accelerator/
real_accelerator.py), the GPU by LOCAL_RANK (runtime/engine.py), which under Open MPI must be the local rank. So
DS_ACCELERATOR is exported as it is decided here, LOCAL_RANK stays the launcher's, and the GPU's number goes to
deepspeed.initialize as `args.device_rank`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from types import SimpleNamespace

from train.distributed.discovery import Ranks
from train.errors import RankError, one_line
from train.versions import installed_versions

QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
COLUMNS = ("name", "driver", "memory")
BINDING_LAUNCHERS = ("srun", "mpirun")
"""They can show each task a GPU of its own (--gpus-per-task, --gpu-bind, rankfiles): then that one is number 0."""


def num_visible_gpus() -> int:
    """GPUs that torch can use: none where the driver does not fit it, although it may count some."""
    import torch  # slow, and what asks the driver below does without

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def kind_here() -> str:
    """What a run on this machine would compute on; see kind_of_device."""
    return kind_of_device(os.environ, num_visible_gpus())


def kind_of_device(environment: Mapping[str, str], num_visible: int) -> str:
    """ "cuda" or "cpu".

    Args:
        num_visible: GPUs that torch can use; 0 where it cannot use any.
    Raises:
        RankError: DS_ACCELERATOR asks for what is not here.
    """
    asked = environment.get("DS_ACCELERATOR", "")
    if asked not in ("", "cpu", "cuda"):
        raise RankError(
            f"DS_ACCELERATOR={asked}: this program runs on cuda and cpu; give one of them, or unset it"
        )
    if asked == "cuda" and num_visible == 0:
        raise RankError(
            "DS_ACCELERATOR=cuda, but torch sees no GPU here (`python launch/doctor.py` says why): unset it, or set "
            "DS_ACCELERATOR=cpu to compute on the CPU"
        )
    return "cuda" if num_visible > 0 and asked != "cpu" else "cpu"


def device_of(ranks: Ranks, environment: Mapping[str, str], num_visible: int, host: str) -> str:
    """The device of a rank: "cpu", or "cuda:N" with N counted among the GPUs that it sees.

    Args:
        num_visible, environment: see kind_of_device.
        host: this machine's name, for the error.
    Raises:
        RankError: see kind_of_device; or there are more ranks on the host than GPUs.
    """
    if kind_of_device(environment, num_visible) == "cpu":
        return "cpu"
    if num_visible == 1 and ranks.launcher in BINDING_LAUNCHERS:
        return "cuda:0"
    if ranks.local_rank >= num_visible:
        raise RankError(
            f"{ranks.local_size} ranks on {host}, but local rank {ranks.local_rank} sees only {num_visible} GPUs: "
            "start one rank per GPU (slots= in the hostfile, --ntasks-per-node in Slurm, -npernode in MPI). Where each "
            "rank is shown GPUs of its own, show it one (--gpus-per-task=1), or set LOCAL_RANK=0 for each"
        )
    return f"cuda:{ranks.local_rank}"


def engine_arguments(device: str) -> SimpleNamespace | None:
    """`args` of deepspeed.initialize, so that its engine takes the GPU of `device`; None on a CPU."""
    kind, _, number = device.partition(":")
    return None if kind == "cpu" else SimpleNamespace(device_rank=int(number))


def gpus_of_driver(timeout_s: float = 60.0) -> list[dict[str, str]]:
    """Name, driver and memory of each GPU, by nvidia-smi; none where it is not installed or finds none. RuntimeError,
    with its own words, where it fails."""
    if shutil.which(QUERY[0]) is None:
        return []
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, errors="replace", timeout=timeout_s)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"nvidia-smi does not answer: {one_line(error)}") from None
    if "No devices were found" in done.stdout:
        return []
    if done.returncode != 0:
        words = " ".join((done.stdout + done.stderr).split())
        raise RuntimeError(f"nvidia-smi ends with code {done.returncode}: {words[:300]}")
    rows = [map(str.strip, line.rsplit(",", 2)) for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(COLUMNS, row, strict=False)) for row in rows]


def unused_gpus(environment: Mapping[str, str], device: str) -> str | None:
    """What to say of GPUs that the driver shows and torch cannot use; None where there are none, or are not wanted.

    Args:
        environment: the variables as the user set them.
    """
    hidden = environment.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    if device != "cpu" or environment.get("DS_ACCELERATOR") == "cpu" or hidden:
        return None
    try:
        gpus = gpus_of_driver(timeout_s=20.0)
    except RuntimeError as error:
        found = str(error)
    else:
        if not gpus:
            return None
        found = f"nvidia-smi shows {len(gpus)} x {gpus[0]['name']}, driver {gpus[0].get('driver', 'unknown')}"
    return (
        f"{found}, but torch {installed_versions()['torch']} cannot use a GPU: this computes on the CPU, in fp32. "
        "`python launch/doctor.py` says why; DS_ACCELERATOR=cpu means it, without this line"
    )
