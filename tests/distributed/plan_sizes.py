"""Sizes of the models and batches that test_plan_memory.py measures; apart, because its ranks import DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A four- or twelve-layer teacher, and the micro batch of its student."""

    vocabulary: int
    width: int
    inner: int
    heads: int
    layers: int
    length: int
    micro: int
    masked: int
    bucket: int


SIZES = {
    "small": Size(211, 32, 128, 4, 4, length=24, micro=3, masked=4, bucket=6000),
    "base": Size(30522, 768, 3072, 12, 12, length=128, micro=2, masked=19, bucket=50_000_000),
}
