"""One shard's bytes, from wherever webdataset can open it, and the tokens in them.

A shard is input from outside: its tar may be hostile. Nothing is unpacked to a file, followed as a link or
unpickled; a member is a plain file whose NumPy header announces one row of unsigned integers, or an error.
Every message names the shard and what to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from webdataset.cache import FileCache
from webdataset.gopen import Pipe, gopen, gopen_schemes

from data_prep.shard_format import (
    TOKENS_KEY,
    Manifest,
    ShardInfo,
    TokenizerInfo,
    is_remote,
    shard_url,
    token_dtype,
)
from train.tar_members import tar_members

_REMEDY = "fetch or write the shards again; data_prep/verify_shards.py checks them all"
# A member holds a document at least, and costs a tar header, a pax header, an .npy header and padding.
_OVERHEAD_PER_DOCUMENT = 4096
_TAR_TRAILER = 64 * 1024
_LONGEST_NPY_HEADER = 256
_READ_BYTES = 1 << 24
_MEMBER_NAME = re.compile(rf"[^/.]+\.{re.escape(TOKENS_KEY)}")
_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([^']{1,16})', 'fortran_order': False, 'shape': \(([0-9, ]{0,64})\), \} *\n",
    re.DOTALL,
)


def _open_s3(url: str, mode: str = "rb", bufsize: int = 8192) -> Pipe:
    return Pipe(["aws", "s3", "cp", "--only-show-errors", url, "-"], mode=mode, bufsize=bufsize)


# webdataset 1.0.2 opens gs:// with gsutil but has no handler for s3://; USE_AIS_FOR may have set one.
gopen_schemes.setdefault("s3", _open_s3)


def url_of(shards: str, shard: ShardInfo) -> str:
    """Where a shard lies."""
    return shard_url(shards, shard.name)


def read_shard(
    shards: str, shard: ShardInfo, *, verify: str = "size", cache: ShardCache | None = None
) -> bytearray:
    """The whole file of a shard.

    Raises:
        ValueError: it is missing, cannot be read, or its size (with verify="full" its sha256) is not the
            manifest's.
    """
    url = url_of(shards, shard)
    if cache is not None and is_remote(url):
        url = cache.local_path(url, shard)
    try:
        data = _read_up_to(url, shard.bytes)
    except OSError as error:
        raise _unreadable(f"shard {shard.name}", url, error) from None
    _check_size(shard, len(data), url)
    if verify == "full" and hashlib.sha256(data).hexdigest() != shard.sha256:
        raise ValueError(
            f"shard {shard.name} at {url} was altered, its sha256 is not the manifest's: {_REMEDY}"
        )
    return data


def _read_up_to(url: str, size: int) -> bytearray:
    """What lies at `url`, but not much more than `size` bytes: what is longer is cut somewhere behind them."""
    data = bytearray()
    try:
        with gopen(url) if is_remote(url) else open(url, "rb") as stream:
            while len(data) <= size and (piece := stream.read(_READ_BYTES)):
                data += piece
    except OSError:
        # A pipe that is closed early fails, too.
        if len(data) <= size:
            raise
    return data


def read_histogram(shards: str, manifest: Manifest) -> np.ndarray:
    """(V,) int64 >= 0: how often each token stands in the train split.

    Raises:
        ValueError: the file is missing, cannot be read, or holds something else.
    """
    url, size = shard_url(shards, manifest.token_histogram), manifest.tokenizer.vocab_size
    what = f"token histogram {manifest.token_histogram}"
    longest = 8 * size + _LONGEST_NPY_HEADER
    try:
        data = _read_up_to(url, longest)
    except OSError as error:
        raise _unreadable(what, url, error) from None
    try:
        counts = _npy_array(memoryview(data)[: longest + 1], "it", np.dtype("<i8"))
    except ValueError as error:
        raise ValueError(f"{what} at {url} is damaged ({error}): {_REMEDY}") from None
    if len(counts) != size or counts.min(initial=0) < 0:
        raise ValueError(
            f"{what} at {url} has {len(counts)} counts, the lowest {counts.min(initial=0)}: "
            f"it must have {size}, none below 0; {_REMEDY}"
        )
    return counts


def shard_tokens(data: bytearray, shard: ShardInfo, tokenizer: TokenizerInfo) -> np.ndarray:
    """(shard.tokens,) uint16 or uint32: the shard's blocks end to end, the format's promises checked."""
    dtype = token_dtype(tokenizer.vocab_size)
    limit = shard.tokens * dtype.itemsize + shard.documents * _OVERHEAD_PER_DOCUMENT + _TAR_TRAILER
    if len(data) > limit:
        raise ValueError(
            f"shard {shard.name} has {len(data)} bytes, too many for its {shard.tokens} tokens: {_REMEDY}"
        )
    try:
        blocks = _tar_blocks(data, dtype)
    except ValueError as error:
        raise ValueError(f"shard {shard.name} is not a shard of tokens ({error}): {_REMEDY}") from None
    tokens = np.concatenate(blocks) if blocks else np.zeros(0, dtype)
    if len(tokens) != shard.tokens:
        raise ValueError(
            f"shard {shard.name} holds {len(tokens)} tokens, not the manifest's {shard.tokens}: {_REMEDY}"
        )
    highest = int(tokens.max(initial=0))
    if highest >= tokenizer.vocab_size:
        vocabulary = f"the vocabulary of {tokenizer.vocab_size}"
        raise ValueError(f"shard {shard.name} holds token {highest}, beyond {vocabulary}: {_REMEDY}")
    documents = int(np.count_nonzero(tokens == tokenizer.sep_id))
    if documents != shard.documents or (len(tokens) and tokens[-1] != tokenizer.sep_id):
        raise ValueError(
            f"shard {shard.name} holds {documents} separators for the manifest's {shard.documents} documents "
            f"or does not end with one: {_REMEDY}"
        )
    return tokens


def check_shard_size(shards: str, shard: ShardInfo) -> None:
    """Refuse a missing, truncated or grown shard without reading it.

    Works on files and on http(s); a shard behind another URL or a pipe is checked when it is read.
    """
    url = url_of(shards, shard)
    size = None
    try:
        if not is_remote(url):
            size = os.path.getsize(url)
        elif url.startswith(("http://", "https://")):
            with urlopen(Request(url, method="HEAD"), timeout=30) as answer:
                size = int(answer.headers.get("Content-Length", -1))
    except (HTTPException, ValueError) as error:
        raise _unreadable(f"shard {shard.name}", url, error) from None
    except HTTPError as error:
        if error.code in (404, 410):
            raise _unreadable(f"shard {shard.name}", url, error) from None
        return  # a server may refuse HEAD and yet serve the file
    except OSError as error:
        raise _unreadable(f"shard {shard.name}", url, error) from None
    if size is not None and size >= 0:
        _check_size(shard, size, url)


class ShardCache:
    """webdataset's file cache for shards that are not local, one file per content.

    The file's name holds the sha256 that the manifest promises, so that two corpora whose shards have the
    same names never mix. A file of the wrong size is removed, and is fetched again at the next start.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def local_path(self, url: str, shard: ShardInfo) -> str:
        """Path of the shard's file in the cache, fetched from `url` where it is not there yet."""
        name = f"{shard.sha256[:16]}-{shard.name}"
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:  # webdataset's temporary file has one name per process
            try:
                path = FileCache(self.folder, url_to_name=lambda _: name, validator=None).get_file(url)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.remove(Path(self.folder, f"{name}.temp{os.getpid()}"))
                raise _unreadable(f"shard {shard.name}", url, error) from None
            size = os.path.getsize(path)
            if size != shard.bytes:
                os.remove(path)
                _check_size(shard, size, url)
            return path


def _unreadable(name: str, url: str, error: Exception) -> ValueError:
    missing = isinstance(error, FileNotFoundError) and not is_remote(url)
    ended = re.search(r": exit (-?\d+) \(read\)", str(error))  # webdataset shows its Popen arguments, too
    words = " ".join(str(error).split()) or type(error).__name__  # a server's answer may hold line ends
    reason = f"its command ended with exit code {ended[1]}" if ended else words
    what = "is missing" if missing else f"cannot be read ({reason})"
    return ValueError(f"{name} at {url} {what}: {_REMEDY}")


def _check_size(shard: ShardInfo, size: int, url: str) -> None:
    if size < shard.bytes:
        raise ValueError(
            f"shard {shard.name} at {url} is truncated, {size} of {shard.bytes} bytes: {_REMEDY}"
        )
    if size > shard.bytes:
        raise ValueError(
            f"shard {shard.name} at {url} was altered, it is longer than {shard.bytes} bytes: {_REMEDY}"
        )


def _tar_blocks(data: bytearray, dtype: np.dtype[Any]) -> list[np.ndarray]:
    """The arrays of a tar's members, as views of `data`."""
    blocks = []
    for name, start, stop in tar_members(data):
        if not _MEMBER_NAME.fullmatch(name):
            raise ValueError(f"member {name!r} is not called KEY.{TOKENS_KEY}")
        blocks.append(_npy_array(memoryview(data)[start:stop], f"member {name!r}", dtype))
    return blocks


def _npy_array(data: memoryview, name: str, dtype: np.dtype[Any]) -> np.ndarray:
    """(n,) view of an .npy file's numbers.

    The header is matched against what np.save writes: numpy's own reader evaluates it as Python, which is
    slower than all else here, raises what a hostile header likes and allocates before it looks.
    """
    header = _NPY_HEADER.match(data)
    if header is None or header.end() != 10 + int.from_bytes(data[8:10], "little"):
        raise ValueError(f"{name} is not an .npy file of one array")
    found, shape = header[1].decode(), header[2].decode()
    if found != dtype.str or not re.fullmatch(r"\d{1,18},", shape):
        raise ValueError(f"{name} is an array of {found}, shape ({shape}), not of {dtype.str} in one row")
    content = data[header.end() :]
    if int(shape[:-1]) * dtype.itemsize != len(content):
        raise ValueError(f"{name} has {len(content)} bytes of numbers for a shape of ({shape})")
    return np.frombuffer(content, dtype=dtype)
