"""What lies at a URL, through webdataset's own handling, without hanging and without leaving anything behind.

webdataset reads what is not local through commands (curl, aws, gsutil, any `pipe:`), and a command may hang, or
have children that do. Here each has a process group of its own, which ends when its reader leaves, when nothing
has come from it for STALL_S, and when this process ends, by whatever: also by kill -9 or os._exit.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from webdataset.gopen import Pipe, gopen, gopen_schemes

from data_prep.shard_format.manifest import is_remote

STALL_S = 300.0
"""How long a command may say nothing: some stores take minutes to fetch from an archive."""
_PIECE = 1 << 16  # what a pipe holds
_FILE_PIECE = 1 << 24
# A watcher beside the command kills the group once stdin ends, whose other end this process alone has.
_WATCHED = (
    'exec 3<&0 </dev/null; { read _ <&3; kill -9 0; } >/dev/null 2>&1 & watcher=$!; exec 3<&-; "$@"; code=$?; '
    "kill -9 $watcher 2>/dev/null; exit $code"
)


class OwnedPipe(Pipe):
    """webdataset's Pipe for reading, whose command ends with it and with this process."""

    def __init__(self, command: Any, mode: str = "rb", shell: bool = False, **options: Any) -> None:
        self._lifeline: int | None = None
        self._owner = os.getpid()
        if not mode.startswith("r"):
            super().__init__(command, mode=mode, shell=shell, **options)
            return
        words = ["/bin/sh", "-c", command] if shell else list(command)
        if shutil.which(words[0]) is None:
            raise FileNotFoundError(f"there is no command {words[0]!r} here")
        watched, self._lifeline = os.pipe()
        options = {**options, "stdin": watched, "start_new_session": True}
        try:
            super().__init__(["/bin/sh", "-c", _WATCHED, "sh", *words], mode=mode, **options)
        finally:
            os.close(watched)
        self.args: tuple[Any, ...] = (words, {})

    def kill(self) -> None:
        """End the command and all of its children at once."""
        if self._lifeline is not None and self._owner == os.getpid():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.proc.pid, signal.SIGKILL)

    def pieces(self) -> Iterator[bytes]:
        """What the command says, as it comes.

        Raises:
            TimeoutError: nothing for STALL_S.
        """
        poll = select.poll()
        poll.register(self.stream.fileno(), select.POLLIN)
        while True:
            if not poll.poll(1000 * STALL_S):
                raise TimeoutError(f"nothing came from it for {STALL_S:.0f} s")
            piece = self.stream.read1(_PIECE)
            if not piece:
                return
            yield piece

    def close(self) -> None:
        """Wait for the command's end, but not for ever.

        Raises:
            OSError: it failed; TimeoutError: it closed its output and does not end.
        """
        self.timeout: float = STALL_S
        try:
            super().close()
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"its command did not end for {STALL_S:.0f} s") from None
        finally:
            self.kill()  # what it may have left in the background
            lifeline, self._lifeline = self._lifeline, None
            if lifeline is not None:
                os.close(lifeline)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        with contextlib.ExitStack() as quiet:
            if kind is not None:
                quiet.enter_context(contextlib.suppress(OSError))  # the error that is under way says more
            self.close()


def open_s3(url: str, mode: str = "rb", bufsize: int = 8192) -> Pipe:
    return OwnedPipe(["aws", "s3", "cp", "--only-show-errors", url, "-"], mode=mode, bufsize=bufsize)


# webdataset's handlers start their commands through this name; the package hides the module behind a function.
sys.modules[gopen.__module__].Pipe = OwnedPipe  # type: ignore[attr-defined]
# webdataset 1.0.2 opens gs:// with gsutil but has no handler for s3://; USE_AIS_FOR may have set one.
gopen_schemes.setdefault("s3", open_s3)


class Readings:
    """The commands of some readers, which end when this context is left, whatever their readers wait for."""

    def __init__(self) -> None:
        self._pipes: set[OwnedPipe] = set()
        self._lock = threading.Lock()
        self._ended = False

    def __enter__(self) -> Readings:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """End what is being read, and what will be."""
        with self._lock:
            self._ended = True
            for pipe in self._pipes:
                pipe.kill()

    def read_up_to(self, url: str, size: int) -> bytearray:
        """What lies at `url`, but not much more than `size` bytes: what is longer is cut somewhere behind them.

        Raises:
            OSError: it cannot be read; TimeoutError: nothing came for STALL_S.
        """
        if not is_remote(url):
            with open(url, "rb") as file:
                return _up_to(size, iter(lambda: file.read(_FILE_PIECE), b""))
        stream = gopen(url)
        if isinstance(stream, OwnedPipe):
            return self._read(stream, size)
        with stream:  # a handler that the user has registered
            return _up_to(size, iter(lambda: stream.read(_FILE_PIECE), b""))

    def output_of(self, command: list[str] | str, limit: int = 1 << 30) -> str:
        """What a command (words, or a line for the shell) prints.

        Raises:
            OSError: it fails, or stalls.
        """
        pipe = OwnedPipe(command, shell=isinstance(command, str))
        return self._read(pipe, limit).decode(errors="backslashreplace")

    def _read(self, pipe: OwnedPipe, size: int) -> bytearray:
        with self._lock:
            self._pipes.add(pipe)
            if self._ended:
                pipe.kill()
        try:
            with pipe:
                data = _up_to(size, pipe.pieces())
                if len(data) > size:
                    raise _EnoughError
        except _EnoughError:
            pass
        finally:
            with self._lock:
                self._pipes.discard(pipe)
        return data


class _EnoughError(Exception):
    """The rest is not wanted: end the command without a word."""


def _up_to(size: int, pieces: Iterator[bytes]) -> bytearray:
    data = bytearray()
    for piece in pieces:
        data += piece
        if len(data) > size:
            break
    return data
