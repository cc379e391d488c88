"""LAMB with exact per-tensor trust ratios, under DeepSpeed's ZeRO stages 1 and 2 and without it; see README.md."""

from .compiler import compile_library, forked
from .optimizer import Lamb
from .parameters import is_bias_or_norm
from .zero_layout import refused_setting

__all__ = ["Lamb", "compile_library", "forked", "is_bias_or_norm", "refused_setting"]
