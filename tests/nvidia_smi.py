"""A stand-in for nvidia-smi: a driver with GPUs, where there is none."""

from __future__ import annotations

from pathlib import Path

A100 = "echo 'NVIDIA A100-SXM4-80GB, 550.54.15, 81920 MiB'"


def stand_in(folder: Path, script: str) -> None:
    """Make `folder`/nvidia-smi of a shell script; the folder is to come first in PATH."""
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
