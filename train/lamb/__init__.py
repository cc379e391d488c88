"""LAMB with exact per-tensor trust ratios, under DeepSpeed's ZeRO stages 1 and 2 and without it; see README.md."""

from .compiler import compile_library, num_threads
from .optimizer import Lamb
from .parameters import is_bias_or_norm
from .zero_layout import refused_setting

__all__ = ["Lamb", "compile_library", "is_bias_or_norm", "num_threads", "refused_setting"]
