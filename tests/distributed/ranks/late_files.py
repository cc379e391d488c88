"""A shared folder on NFS, simulated: what one rank writes is seen late by the others."""

from __future__ import annotations

import builtins
import errno
import functools
import io
import os
import time
from collections.abc import Callable
from typing import Any

LATE_S = 1.0


def see_late(folder: str) -> None:
    """In this process: what another rank has made under `folder` is not there for a second from when it is asked for,
    unless the folder that it lies in is listed.

    A rank's own are its partitions of checkpoints; all else is rank 0's.
    """
    first_asked: dict[str, float] = {}
    rank = int(os.environ["RANK"])

    def is_late(path: Any) -> bool:
        if isinstance(path, int) or not os.fsdecode(path).startswith(folder + "/"):
            return False
        name = os.path.basename(os.fsdecode(path))
        owner = int(name.split("_")[3]) if name.startswith("zero_pp_rank_") else 0
        return (
            owner != rank and time.monotonic() < first_asked.setdefault(str(path), time.monotonic()) + LATE_S
        )

    def late(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(path: Any = ".", *args: Any, **options: Any) -> Any:
            if is_late(path):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return call(path, *args, **options)

        return wrapped

    def listing(call: Callable[..., Any], names: Callable[..., list[str]] = os.listdir) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(path: Any = ".") -> Any:
            if not isinstance(path, int):
                first_asked.update((os.path.join(path, name), -LATE_S) for name in names(path))
            return call(path)

        return wrapped

    for name in ("stat", "lstat", "open"):
        setattr(os, name, late(getattr(os, name)))
    os.listdir, os.scandir = listing(os.listdir), listing(os.scandir)  # type: ignore[assignment]
    builtins.open = io.open = late(io.open)  # type: ignore[assignment]
    make = os.mkdir

    def mkdir(path: Any, *args: Any, **options: Any) -> None:
        first_asked[str(path)] = -LATE_S  # the server is asked, and its answer kept
        make(path, *args, **options)

    os.mkdir = mkdir
