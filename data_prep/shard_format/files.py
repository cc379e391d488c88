"""Files and folders that are whole or not there, and locks between processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_prep.shard_format.errors import UserError

SEEN_LATE_S = 75.0


@contextlib.contextmanager
def new_file(path: Path, binary: bool = False, shared: bool = False) -> Iterator[IO[Any]]:
    """A file to write, which takes its place at `path` in one step when the block ends without an error.

    A reader finds the old file or the whole new one, also after a crash: the content is on the disk before the name
    changes. After an error nothing is left.

    Args:
        shared: several processes, of any hosts, may write this file at once; what a killed one leaves stays.
    """
    writer = f".{uuid.uuid4().hex}" if shared else ""
    partial = path.with_name(f".{path.name}{writer}.partial")
    try:
        with partial.open("wb") if binary else partial.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.filename is None:  # as of a write to a disk that is full
            error.filename = str(path)
        raise


def write_array(path: Path, array: np.ndarray) -> None:
    """Put `array` at `path` as an .npy file, in one step."""
    with new_file(path, binary=True) as file:
        np.save(file, array)


def write_text(path: Path, text: str) -> None:
    """Put `text` at `path` in one step."""
    with new_file(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Put `value` at `path` as indented JSON, in one step."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def refuse_pipe(path: str | os.PathLike[str]) -> None:
    """UserError for a named pipe, for whose writer a reader would wait for ever; those of a shell's <(...) have one.

    Raises:
        OSError: there is nothing.
    """
    if stat.S_ISFIFO(os.stat(path).st_mode) and not str(path).startswith(("/dev/fd/", "/proc/self/fd/")):
        raise UserError(f"{path} is a named pipe; put the file itself there")


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The content of a file; UserError as `refuse_pipe`, OSError where it cannot be opened."""
    refuse_pipe(path)
    return Path(path).read_bytes()


def parse_json(text: str | bytes, where: str, remedy: str) -> Any:
    """The value of a JSON text that something else may have damaged.

    Args:
        where: what the text is, for the message: a file, and a line where it holds several texts.
        remedy: what the user can do, for its end.
    Raises:
        UserError: it is no JSON, no UTF-8, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:  # UnicodeDecodeError and numbers of thousands of digits too
        reason = " ".join(str(error).split())[:200]
    raise UserError(f"{where} is damaged ({reason}); {remedy}")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The keys of a JSON file, refused in one message where it is damaged; see `parse_json`.

    Raises:
        UserError: also where it holds a list or a single value, or is a named pipe.
        OSError: it cannot be opened.
    """
    tree = parse_json(read_file(path), str(path), remedy)
    if not isinstance(tree, dict):
        raise UserError(f"{path} is damaged (it holds no keys); {remedy}")
    return tree


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place at `path` when the block ends without an error.

    What was at `path` goes at that moment. After an error nothing new is left, and `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def until_seen(look: Callable[[], str | None], folder: Path) -> str | None:
    """What `look` finds wrong with files that another host has written, tried again while they may be on their way.

    NFS shows a host what others have written late: names up to a minute (acdirmax), where it had asked for them before.

    Args:
        look: None where all is there.
        folder: where they are; listing it has NFS ask the server again.
    """
    deadline = time.monotonic() + SEEN_LATE_S
    while (missing := look()) is not None and time.monotonic() < deadline:
        time.sleep(0.2)
        for _ in os.walk(folder):
            pass
    return missing


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file for this process until it is closed; False where another process has it.

    Raises:
        UserError: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise UserError(
            f"{file.name} cannot be locked ({error.strerror}), which keeps two jobs out of one folder: mount that file "
            "system with locks (Lustre: -o flock), or choose another folder"
        ) from None
    return True
