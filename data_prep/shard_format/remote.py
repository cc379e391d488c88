"""Bytes and sizes of files at a path or URL, through fsspec: the one way in which manifests and shards are read.

Nothing here waits for ever. A read to which nothing comes for STALL_S ends with a TimeoutError, whatever the limits
and retries of the store's library; one that breaks off is tried again a few times. Settings of a store (credentials,
endpoints, proxies) are its library's own: environment variables such as AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME or HF_TOKEN, and fsspec's configuration.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import IO, Any, TypeVar

from data_prep.shard_format.errors import UserError
from data_prep.shard_format.files import refuse_pipe
from data_prep.shard_format.required_packages import install_command

Result = TypeVar("Result")

STALL_S = 300.0
"""How long a store may send nothing: some take minutes to fetch from an archive."""
SIZE_LIMIT_S = 30.0
"""How long it may take to answer for a size."""
RETRY_AFTER_S = (1.0, 3.0)
"""Seconds to wait before each new attempt over http."""
_PIECE = 1 << 24  # which a store other than http must send within STALL_S: 56 kB/s
_PACKAGES = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "gs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
}
# An answer 4xx is for good, but for these.
_BUSY = (408, 425, 429)


def scheme_of(url: str) -> str:
    """The scheme of a URL; "" for a path or a file: URL.

    Raises:
        UserError: it is none of those that are read.
    """
    scheme, separator, _ = url.partition("://")
    if url.startswith("pipe:"):
        scheme = "pipe"
    elif not separator or scheme == "file":
        return ""
    if scheme not in _PACKAGES:
        known = ", ".join(f"{name}://" for name in _PACKAGES)
        raise UserError(f"{url} cannot be read ({scheme}:): give a path, a file: URL, or a URL of {known}")
    return scheme


def is_remote(url: str) -> bool:
    """True for what is read over a network, False for a path or a file: URL."""
    return scheme_of(url) != ""


def read_bytes(url: str, limit: int | None = None) -> bytearray:
    """What lies at a path or URL; of what is longer than `limit` bytes, the first limit + 1.

    Raises:
        FileNotFoundError: it is not there.
        TimeoutError: nothing came for STALL_S.
        OSError: it cannot be read; the text has the reason.
        UserError: the scheme is not read, its package is not installed, or a named pipe is there.
    """
    if not is_remote(url):
        refuse_pipe(url)
        with open(url, "rb") as file:
            return _read(file, limit)
    filesystem = _filesystem_of(url)
    # Block size 0 is a stream, not ranges, which not every server has; any size spares a HEAD request.
    how: dict[str, Any] = {"cache_type": "none"}
    if scheme_of(url) in ("http", "https"):
        how = {"block_size": 0, "size": 1}

    def read(progress: Callable[[], None]) -> bytearray:
        with filesystem.open(url, "rb", **how) as file:
            progress()
            return _read(file, limit, progress)

    return _attempts(scheme_of(url), read, STALL_S)


def file_size(url: str) -> int | None:
    """Bytes at a path or URL, which are not read; None where the server does not say.

    Raises:
        as read_bytes, with SIZE_LIMIT_S.
    """
    if not is_remote(url):
        return os.path.getsize(url)
    filesystem = _filesystem_of(url)
    return _attempts(scheme_of(url), lambda progress: filesystem.info(url)["size"], SIZE_LIMIT_S)


def folder_sizes(folder: str) -> dict[str, int] | None:
    """Bytes of the files of a URL's folder by name, from one listing; None where it cannot be listed.

    http has no listings, and who may read a store's objects need not be allowed to list them.
    """
    if scheme_of(folder) in ("", "http", "https"):
        return None
    filesystem = _filesystem_of(f"{folder}/")

    def sizes(progress: Callable[[], None]) -> dict[str, int]:
        filesystem.invalidate_cache()
        entries = filesystem.ls(folder, detail=True)
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries}

    try:
        return _attempts(scheme_of(folder), sizes, STALL_S)
    except OSError:
        return None


def _read(file: IO[bytes], limit: int | None, progress: Callable[[], None] = lambda: None) -> bytearray:
    # In pieces: `limit` comes from a manifest, and may be more than there is memory.
    data = bytearray()
    while limit is None or len(data) <= limit:
        piece = file.read(_PIECE if limit is None else min(_PIECE, limit + 1 - len(data)))
        if not piece:
            break
        data += piece
        progress()
    return data


def _filesystem_of(url: str) -> Any:
    # Some stores have their account in the URL. fsspec's objects must not be used after a fork.
    return _filesystem(url.rpartition("/")[0], os.getpid())


@functools.lru_cache(maxsize=16)
def _filesystem(folder: str, process: int) -> Any:
    import fsspec  # 0.15 s that local shards need not cost

    scheme = scheme_of(folder)
    # Threads share it, and its connections, where fsspec's own cache has one for each thread.
    options: dict[str, Any] = {"skip_instance_cache": True}
    try:
        if scheme in ("http", "https"):
            import aiohttp  # of this scheme alone

            # aiohttp's limit for the whole of a download would be five minutes.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=SIZE_LIMIT_S, sock_read=STALL_S)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
        if scheme == "s3":  # s3fs tries five times; botocore's five beneath it would make minutes of that
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}
        return fsspec.url_to_fs(folder, **options)[0]
    except ImportError as error:
        raise UserError(
            f"{scheme}:// URLs are read with the package {_PACKAGES[scheme]}, which is not installed ({error}): "
            f"{install_command('remote')}"
        ) from None


def _attempts(scheme: str, work: Callable[[Callable[[], None]], Result], limit_s: float) -> Result:
    # The stores' libraries try again by themselves.
    pauses_s = RETRY_AFTER_S if scheme in ("http", "https") else ()
    for wait_s in (*pauses_s, None):
        try:
            return _within(limit_s, work)
        except Exception as error:  # each store's library has classes of its own
            failure = _as_os_error(error)
            if wait_s is None or isinstance(failure, (FileNotFoundError, PermissionError, TimeoutError)):
                raise failure from None
            time.sleep(wait_s)
    raise AssertionError


def _within(limit_s: float, work: Callable[[Callable[[], None]], Result]) -> Result:
    """What `work` returns; TimeoutError where it neither ends nor calls its argument for `limit_s`.

    A library that waits cannot be interrupted: its thread is left behind, a daemon, which keeps no process from
    ending and itself ends with the next call of `progress`.
    """
    future: Future[Result] = Future()
    latest, abandoned = time.monotonic(), False

    def progress() -> None:
        nonlocal latest
        latest = time.monotonic()
        if abandoned:
            raise TimeoutError

    def run() -> None:
        try:
            future.set_result(work(progress))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="remote", daemon=True).start()
    try:
        while not wait([future], max(0.0, latest + limit_s - time.monotonic())).done:
            if time.monotonic() - latest >= limit_s:
                raise TimeoutError(f"nothing came for {limit_s:g} s")
        return future.result()
    finally:
        abandoned = True


def _as_os_error(error: Exception) -> OSError:
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # fsspec's http calls every failure to tell a size so
    status, name = getattr(error, "status", None), type(error).__name__
    text = str(error) if isinstance(error, OSError) and str(error) else f"{name}: {error}".removesuffix(": ")
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError(text)
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return TimeoutError(text)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _BUSY
    if isinstance(error, PermissionError) or refused:
        return PermissionError(text)
    return OSError(text)
