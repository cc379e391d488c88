"""Progress bars of every command: on a terminal, and in a log."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm import tqdm


def progress_bar(*arguments: Any, **options: Any) -> tqdm:
    """tqdm that follows the width of the terminal and is drawn 5 times a second; in a log, once in 5 s.

    Some terminals (a serial line, say) claim to be 0 columns wide, and tqdm would draw nothing:
    they get 80.
    """
    try:
        is_unknown = os.get_terminal_size(sys.stderr.fileno()).columns == 0
    except (OSError, ValueError, AttributeError):  # no terminal, or closed
        is_unknown = False
    width: dict[str, Any] = {"ncols": 80} if is_unknown else {"dynamic_ncols": True}
    return tqdm(*arguments, **{"mininterval": 0.2 if sys.stderr.isatty() else 5.0, **width, **options})
