"""Common GPUs, as their makers' datasheets describe them: matrix rate, memory, link inside a node."""

from __future__ import annotations

from dataclasses import dataclass

LINK_EFFICIENCY = 0.75
"""Share of a link's nominal rate that a large all-reduce reaches (bus bandwidth of NVIDIA's nccl-tests: about
230 of 300 GB/s on A100, 360 of 450 on H100). Applied to the defaults alone, not to rates that are given."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    tflops: float
    """Dense fp16 matrix products with fp32 sums, 1e12 FLOP/s; never the figure "with sparsity"."""
    bf16: bool
    """Whether bf16 runs at that rate."""
    memory_gib: float
    link_gb_per_s: float
    """Nominal rate of its link to the others in a node, one direction (half the datasheet's figure), 1e9 bytes/s."""
    link: str
    source: str


_A100 = "NVIDIA A100 Tensor Core GPU datasheet (2021)"

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("V100-16GB", 125, False, 16, 150, "NVLink 2", "NVIDIA V100 datasheet (2020), SXM2"),
        Gpu("V100-32GB", 125, False, 32, 150, "NVLink 2", "NVIDIA V100 datasheet (2020), SXM2"),
        Gpu("A100-40GB", 312, True, 40, 300, "NVLink 3", _A100 + ", SXM"),
        Gpu("A100-80GB", 312, True, 80, 300, "NVLink 3", _A100 + ", SXM"),
        Gpu(
            "H100", 989.4, True, 80, 450, "NVLink 4", "NVIDIA H100 datasheet (2022), SXM: 1,979 with sparsity"
        ),
        Gpu(
            "H200",
            989.4,
            True,
            141,
            450,
            "NVLink 4",
            "NVIDIA H200 datasheet (2023), SXM: 1,979 with sparsity",
        ),
        Gpu(
            "B200",
            2250,
            True,
            180,
            900,
            "NVLink 5",
            "NVIDIA Blackwell datasheet (2024), HGX: 4,500 with sparsity",
        ),
        Gpu("L40S", 362.05, True, 48, 32, "PCIe 4 x16", "NVIDIA L40S datasheet (2023): 733 with sparsity"),
        Gpu(
            "RTX4090",
            165.2,
            True,
            24,
            32,
            "PCIe 4 x16",
            "NVIDIA Ada GPU architecture whitepaper v2, appendix A: fp32 sums; 330.3 with fp16 sums",
        ),
    )
}


def find_gpu(name: str) -> Gpu:
    """A GPU by its name in any case and punctuation.

    Raises:
        ValueError: it is not in the table; the message lists what is.
    """
    wanted = _plain(name)
    aliases = {"v100": "V100-16GB", "a100": "A100-80GB", "4090": "RTX4090"}
    for gpu in GPUS.values():
        if _plain(gpu.name) == wanted or gpu.name == aliases.get(wanted):
            return gpu
    raise ValueError(
        f"--gpu {name}: not in the table, which has {', '.join(GPUS)}; for another one give a similar name with "
        "--matrix-rate (TFLOP/s) and --memory-gib"
    )


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
