"""Where a CPU's tensors lie: freed memory stays with the process for the next step.

glibc returns large blocks to the system when they are freed and asks for them again in the next step, which costs a
page fault, and zeros written, for every 4 KiB. docs/NOTES.md says what it costs.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""
NEVER = -1


def keep_freed_memory() -> bool:
    """Have malloc keep what this process frees from now on.

    Numbers do not change. Resident memory stays at the highest that was needed at once.

    Returns:
        False where the C library is not glibc, and nothing has changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER))
