"""Common GPUs: matrix rate and link inside a node from their makers' datasheets, memory as nvidia-smi shows it."""

from __future__ import annotations

from dataclasses import dataclass

from train.errors import UserError

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
    memory_mib: int
    """All of it, as nvidia-smi shows it (the smallest figure where its versions differ): below the nominal size."""
    link_gb_per_s: float
    """Nominal rate of its link to the others in a node, one direction (half the datasheet's figure), 1e9 bytes/s."""
    link: str
    source: str
    """Of the rate."""

    @property
    def memory_gib(self) -> float:
        return round(self.memory_mib / 1024, 1)


_A100 = "NVIDIA A100 Tensor Core GPU datasheet (2021), SXM"
_V100 = "NVIDIA V100 datasheet (2020), SXM2"
_ADA = "NVIDIA Ada GPU architecture whitepaper v2, appendix A: fp32 sums; 330.3 with fp16 sums"
_HOPPER = "SXM: 1,979 with sparsity"
_B200 = "NVIDIA Blackwell datasheet (2024), HGX: 4,500 with sparsity"
_TABLE = (
    Gpu("T4", 65, False, 15109, 16, "PCIe 3 x16", "NVIDIA T4 datasheet (2019)"),
    Gpu("V100-16GB", 125, False, 16160, 150, "NVLink 2", _V100),
    Gpu("V100-32GB", 125, False, 32510, 150, "NVLink 2", _V100),
    Gpu("A10G", 70, True, 22731, 32, "PCIe 4 x16", "NVIDIA A10G datasheet (2021): 140 with sparsity"),
    Gpu("A100-40GB", 312, True, 40536, 300, "NVLink 3", _A100),
    Gpu("A100-80GB", 312, True, 81251, 300, "NVLink 3", _A100),
    Gpu("L4", 121, True, 22731, 32, "PCIe 4 x16", "NVIDIA L4 datasheet (2023): 242 with sparsity"),
    Gpu("L40S", 362.05, True, 46068, 32, "PCIe 4 x16", "NVIDIA L40S datasheet (2023): 733 with sparsity"),
    Gpu("RTX4090", 165.2, True, 24564, 32, "PCIe 4 x16", _ADA),
    Gpu("H100", 989.4, True, 81559, 450, "NVLink 4", f"NVIDIA H100 datasheet (2022), {_HOPPER}"),
    Gpu("H200", 989.4, True, 143771, 450, "NVLink 4", f"NVIDIA H200 datasheet (2023), {_HOPPER}"),
    Gpu("B200", 2250, True, 183359, 900, "NVLink 5", _B200),
)
GPUS = {gpu.name: gpu for gpu in _TABLE}


def find_gpu(name: str) -> Gpu:
    """A GPU by its name in any case and punctuation.

    Raises:
        UserError: it is not in the table; the message lists what is.
    """
    wanted = _plain(name)
    aliases = {"v100": "V100-16GB", "a100": "A100-80GB", "4090": "RTX4090"}
    for gpu in GPUS.values():
        if _plain(gpu.name) == wanted or gpu.name == aliases.get(wanted):
            return gpu
    raise UserError(
        f"--gpu {name}: not in the table, which has {', '.join(GPUS)}; for another one give a similar name with "
        "--matrix-rate (TFLOP/s) and --memory-gib"
    )


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
