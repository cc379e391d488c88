"""The size of every shard before anything is trained, without reading the shards.

A file's comes from its folder, an http(s) shard's from a HEAD request (or a GET that is left after its headers,
where HEAD is refused), an s3 or gs shard's from one listing of its folder (or, where listing is refused, from
one query per shard). A `pipe:` is a command that nothing can be asked but its bytes: HALFLING_PIPE_SIZE may hold
another one that prints a size, to which "/NAME" is appended as it is to the pipe's, for instance
`ssh store stat -c %s /data/shards` for `pipe:ssh store cat /data/shards`. Without it, and behind webdataset's
other schemes, a shard's size is checked when it is read; data.verify=full reads all of them before training.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from webdataset.gopen import gopen_gsutil, gopen_schemes, rewrite_url

from data_prep.shard_format.manifest import ShardInfo, is_remote, shard_url
from train.data.shard_messages import check_size, unreadable
from train.data.shard_streams import Readings, open_s3

PIPE_SIZE = "HALFLING_PIPE_SIZE"
_THREADS = 8
_CHUNK = 256  # shards per job: a million of them are checked in seconds
_TIMEOUT_S = 30.0
# A store that is asked too often or is being restarted says so with these; seconds to wait before each retry.
_BUSY = {429, 500, 502, 503, 504}
_RETRY_AFTER_S = (1.0, 3.0)


def check_shard_sizes(shards: str, infos: Sequence[ShardInfo]) -> None:
    """Refuse missing, truncated or grown shards, the first of them in the order given.

    Raises:
        UserError: names the shard, what is wrong and what to do.
    """
    readings = Readings()
    size_of = _sizes(shards, infos, readings)
    if size_of is None:
        return

    def check(chunk: Sequence[ShardInfo]) -> None:
        for shard in chunk:
            url = shard_url(shards, shard.name)
            try:
                size = size_of(rewrite_url(url), shard.name)
            except (OSError, HTTPException, ValueError) as error:
                raise unreadable(f"shard {shard.name}", url, error) from None
            if size is not None:
                check_size(shard, size, url)

    step = 1 if is_remote(shards) else _CHUNK
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for _ in pool.map(check, [infos[i : i + step] for i in range(0, len(infos), step)]):
            pass
    finally:
        readings.end()  # an error, or an interrupt, waits for no other shard
        pool.shutdown(cancel_futures=True)


def _sizes(
    shards: str, infos: Sequence[ShardInfo], readings: Readings
) -> Callable[[str, str], int | None] | None:
    """From URL and name to size in bytes (None: not told); None where nothing tells sizes."""
    if not infos:
        return None
    folder = rewrite_url(shard_url(shards, infos[0].name))[: -len(infos[0].name)]
    scheme = folder.partition(":")[0] if is_remote(folder) else ""
    if not scheme:
        return lambda url, name: os.path.getsize(url)
    if scheme in ("http", "https"):
        return lambda url, name: _http_size(url)
    if scheme == "s3" and gopen_schemes["s3"] is open_s3:
        return _listed(["aws", "s3", "ls", folder], _S3_LINE, _s3_size, readings)
    if scheme == "gs" and gopen_schemes["gs"] is gopen_gsutil:
        return _listed(["gsutil", "ls", "-l", folder], _GS_LINE, _gs_size, readings)
    command = os.environ.get(PIPE_SIZE, "").rstrip("/")
    if scheme == "pipe" and command:
        return lambda url, name: int(readings.output_of(shard_url(command, name)))
    return None


# Date, time, bytes, name; and bytes, time, URL.
_S3_LINE = re.compile(r"^\S+ +\S+ +(\d+) (\S+)$", re.MULTILINE)
_GS_LINE = re.compile(r"^ *(\d+) +\S+ +gs://\S*/([^/\s]+)$", re.MULTILINE)


def _listed(
    command: list[str],
    line: re.Pattern[str],
    size_of: Callable[[str, Readings], int],
    readings: Readings,
) -> Callable[[str, str], int | None]:
    try:
        sizes = {name: int(size) for size, name in line.findall(readings.output_of(command))}
    except OSError:  # a reader of objects need not be allowed to list them
        return lambda url, name: size_of(url, readings)

    def listed(url: str, name: str) -> int:
        if name not in sizes:
            raise FileNotFoundError(f"`{' '.join(command)}` does not list it")
        return sizes[name]

    return listed


def _s3_size(url: str, readings: Readings) -> int:
    parts = urlsplit(url)
    bucket_and_key = ["--bucket", parts.netloc, "--key", parts.path.lstrip("/")]
    query = ["--query", "ContentLength", "--output", "text"]
    return int(readings.output_of(["aws", "s3api", "head-object", *bucket_and_key, *query]))


def _gs_size(url: str, readings: Readings) -> int:
    told = re.search(r"Content-Length: *(\d+)", readings.output_of(["gsutil", "stat", url]))
    if told is None:
        raise OSError("`gsutil stat` tells no Content-Length")
    return int(told[1])


def _http_size(url: str) -> int | None:
    """Content-Length, None where the server does not tell it."""
    for wait_s in (*_RETRY_AFTER_S, None):
        try:
            return _content_length(url)
        except HTTPError as error:
            if wait_s is None or error.code not in _BUSY:
                raise
            time.sleep(wait_s)
    raise AssertionError


def _content_length(url: str) -> int | None:
    try:
        answer = urlopen(Request(url, method="HEAD"), timeout=_TIMEOUT_S)
    except HTTPError as error:
        if error.code in (404, 410) or error.code in _BUSY:
            raise
        answer = urlopen(url, timeout=_TIMEOUT_S)  # a signed URL is for one method; others have no HEAD
    with answer:
        length = answer.headers.get("Content-Length")
        return None if length is None else int(length)
