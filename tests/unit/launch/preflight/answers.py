"""What hosts answer to the doctor, made up."""

from __future__ import annotations

import copy
from typing import Any

GPU = {"name": "NVIDIA A100", "driver": "550.54", "memory": "81920 MiB", "used": "0 MiB"}
DEVICE = {"name": "NVIDIA A100", "memory_gib": 79.2, "capability": "8.0", "fault": None}
BROKEN = {**DEVICE, "fault": "out of memory"}
TORCH = {
    "torch": "2.13.0+cu130",
    "kind": "cuda",
    "asked": "",
    "why": "",
    "nccl": "2.27",
    "devices": [DEVICE] * 2,
}
ON_CPU: dict[str, Any] = {
    "torch": "2.13.0+cpu",
    "kind": "cpu",
    "asked": "",
    "why": "it is built without CUDA",
}
ON_CPU |= {"nccl": None, "devices": [{"name": "CPU", "fault": None}]}
HEALTHY: dict[str, Any] = {
    "versions": {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8"},
    "code": "0123456789ab",
    "memory": {"total_gib": 100.0, "free_gib": 90.0, "shm_gib": 50.0},
    "gpus": [GPU, GPU],
    "torch": TORCH,
    "run_folder": {"free_gib": 100.0},
    "shards": {"digest": "aaaa", "shards": 3},
    "teachers": {"/t": "bbbb"},
    "variables": {},
    "clock_ahead_s": (-0.01, 0.4),
}
SLOTS = {"a": 2, "b": 2}


def hosts(**changed: Any) -> dict[str, dict[str, Any]]:
    """Two healthy hosts, the second with some answers changed."""
    return {"a": copy.deepcopy(HEALTHY), "b": {**copy.deepcopy(HEALTHY), **changed}}
