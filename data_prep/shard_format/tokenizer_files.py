"""A Hugging Face tokenizer's files, written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """tokenizer.save_pretrained, whose Rust part names neither the file nor its kind of error.

    Raises:
        OSError: of the disk.
    """
    try:
        tokenizer.save_pretrained(folder)
    except OSError as error:
        error.filename = error.filename or str(folder)
        raise
    except Exception as error:  # the bindings have no class of their own
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            if f"(os error {number})" in str(error):
                raise OSError(number, os.strerror(number), str(folder)) from None
        raise
