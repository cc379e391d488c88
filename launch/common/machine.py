"""The hardware that a figure was taken on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def hardware(device: str = "cpu") -> str:
    """The GPU's name ("cuda"), or the processor's and how many of them there are ("cpu")."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} CPUs"
