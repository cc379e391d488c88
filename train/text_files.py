"""Text that users write by hand. Needs nothing but Python: the doctor's probe reads such files on every host."""

from __future__ import annotations

from pathlib import Path

from train.errors import UserError


def read_utf8(path: Path, name: str) -> str:
    """Text of a file.

    Args:
        name: what a message calls it, such as the flag that gave it.
    Raises:
        UserError: it is not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{name} is not UTF-8 (byte 0x{byte:02x} at offset {error.start}); save it as UTF-8 text"
        ) from None
