"""Which errors come from the ranks' communication, and what they say."""

from __future__ import annotations

import torch.distributed as dist

LONGEST = 1500
"""NCCL says what went wrong, and how, in its last lines."""


def is_from_a_collective(error: BaseException) -> bool:
    """torch's own errors of collectives and stores, NCCL's among them; or gloo's, which are RuntimeErrors that begin
    with the place in its source."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "third_party/gloo/" in str(error)
    )


def cause_of(error: BaseException) -> str:
    """The whole message on one line, without torch's C++ stack."""
    text = str(error).partition("Exception raised from")[0]
    return " ".join(text.split())[:LONGEST] or type(error).__name__
