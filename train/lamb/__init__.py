"""LAMB with exact per-tensor trust ratios, under DeepSpeed's ZeRO stages 1 and 2 and without it; see README.md."""

from .optimizer import Lamb

__all__ = ["Lamb"]
