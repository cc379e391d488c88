"""One shard's bytes, from wherever webdataset can open it, and the tokens in them.

A shard is input from outside: its tar may be hostile. Nothing is unpacked to a file, followed as a link or
unpickled; a member is a plain file with a NumPy header of one unsigned integer dimension, or an error.
Every message names the shard and what to do.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shlex
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import webdataset
from webdataset.cache import FileCache

from data_prep.shard_format import TOKENS_KEY, ShardInfo, TokenizerInfo, token_dtype

_REMEDY = "fetch or write the shards again; data_prep/verify_shards.py checks them all"
# A member holds a document at least and costs a tar header, a pax header, an .npy header and padding.
_OVERHEAD_PER_DOCUMENT = 4096
_TAR_TRAILER = 64 * 1024


def is_url(location: str) -> bool:
    """True for what webdataset must open (http://..., gs://..., pipe:...), False for a local path."""
    return re.match(r"^(pipe:|[A-Za-z][A-Za-z0-9+.-]*://)", location) is not None


def shard_url(shards: str, name: str) -> str:
    """Where file `name` of the shards at `shards` lies, as webdataset's gopen takes it.

    `shards` is a folder, a URL of one (http, https, gs, s3, ...), or a URL or `pipe:` command with {} where
    the file's name goes: "pipe:ssh host cat /corpus/{}". s3:// becomes `aws s3 cp`, which gopen lacks.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        # The name comes from a manifest and may end up in a shell command.
        raise ValueError(
            f"the manifest names a file {name!r}: a shard's name is letters, digits, '.', '_', '-'"
        )
    if not is_url(shards):
        return str(Path(shards, name))
    if shards.startswith("file://"):
        return str(Path(shards.removeprefix("file://"), name))
    if "{}" in shards:
        return shards.replace("{}", name)
    if shards.startswith("pipe:"):
        raise ValueError(f"data.shards is {shards!r}: a pipe needs {{}} where the file's name goes")
    url = f"{shards.rstrip('/')}/{name}"
    return f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3://") else url


def read_shard(
    shards: str, shard: ShardInfo, *, verify: str = "size", cache: ShardCache | None = None
) -> bytearray:
    """The whole file of a shard, its size (and with verify="full" its sha256) as the manifest says."""
    url = shard_url(shards, shard.name)
    if cache is not None and is_url(url):
        url = cache.local_path(url, shard)
    try:
        with webdataset.gopen.gopen(url) if is_url(url) else open(url, "rb") as stream:
            data = _read_at_most(stream, shard.bytes + 1)
    except FileNotFoundError:
        raise ValueError(f"shard {shard.name} is missing at {url}: {_REMEDY}") from None
    except OSError as error:
        raise ValueError(f"shard {shard.name} cannot be read at {url} ({error}): {_REMEDY}") from None
    _check_size(shard, len(data), url)
    if verify == "full" and hashlib.sha256(data).hexdigest() != shard.sha256:
        raise ValueError(
            f"shard {shard.name} at {url} was altered, its sha256 is not the manifest's: {_REMEDY}"
        )
    return data


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
    except (tarfile.TarError, ValueError, OSError, EOFError, OverflowError, KeyError, UnicodeError) as error:
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
    """Refuse a missing, truncated or grown shard without reading it; what lies behind a pipe is not checked."""
    url = shard_url(shards, shard.name)
    size = _size_without_reading(url, shard)
    if size is not None:
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
        name = f"{shard.sha256[:16]}-{shard.name}"
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:  # webdataset downloads to one temporary name per process
            cache = FileCache(self.folder, url_to_name=lambda _: name, validator=_accept)
            try:
                path = cache.get_file(url)
            except OSError as error:
                raise ValueError(
                    f"shard {shard.name} cannot be fetched from {url} ({error}): {_REMEDY}"
                ) from None
            if os.path.getsize(path) != shard.bytes:
                size = os.path.getsize(path)
                os.remove(path)
                _check_size(shard, size, url)
            return path


def _accept(path: str) -> bool:
    return True


def _read_at_most(stream: io.BufferedIOBase, limit: int) -> bytearray:
    data = bytearray()
    while len(data) < limit:
        piece = stream.read(min(limit - len(data), 1 << 24))
        if not piece:
            break
        data += piece
    return data


def _check_size(shard: ShardInfo, size: int, url: str) -> None:
    if size < shard.bytes:
        raise ValueError(
            f"shard {shard.name} at {url} is truncated, {size} of {shard.bytes} bytes: {_REMEDY}"
        )
    if size > shard.bytes:
        raise ValueError(
            f"shard {shard.name} at {url} was altered, it is longer than {shard.bytes} bytes: {_REMEDY}"
        )


def _size_without_reading(url: str, shard: ShardInfo) -> int | None:
    if not is_url(url):
        try:
            return os.path.getsize(url)
        except OSError:
            raise ValueError(f"shard {shard.name} is missing at {url}: {_REMEDY}") from None
    if not url.startswith(("http://", "https://")):
        return None
    try:
        with urlopen(Request(url, method="HEAD"), timeout=30) as answer:
            length = answer.headers.get("Content-Length")
    except OSError as error:
        raise ValueError(f"shard {shard.name} is missing at {url} ({error}): {_REMEDY}") from None
    return int(length) if length is not None else None


def _tar_blocks(data: bytearray, dtype: np.dtype) -> list[np.ndarray]:
    """The arrays of a tar's members, as views of `data`."""
    blocks = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for member in tar:
            if not member.isreg() or member.issparse():
                raise ValueError(f"member {member.name!r} is not a plain file")
            if not re.fullmatch(rf"[^/.]+\.{re.escape(TOKENS_KEY)}", member.name):
                raise ValueError(f"member {member.name!r} is not called KEY.{TOKENS_KEY}")
            stop = member.offset_data + member.size
            if stop > len(data):
                raise ValueError(f"member {member.name!r} ends beyond the file")
            blocks.append(_npy_array(memoryview(data)[member.offset_data : stop], member.name, dtype))
    return blocks


def _npy_array(data: memoryview, name: str, dtype: np.dtype) -> np.ndarray:
    """(n,) view of an .npy file's numbers; the header is parsed as a literal and nothing is unpickled."""
    start = io.BytesIO(data[:16384])
    try:
        version = np.lib.format.read_magic(start)
        readers: dict[tuple[int, int], Callable] = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, _, found = readers[version](start)
    except (ValueError, KeyError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"member {name!r} is not an .npy file of this format ({error})") from None
    if found != dtype or len(shape) != 1:
        raise ValueError(
            f"member {name!r} is an array of {found} and {len(shape)} dimensions, not of {dtype} and 1"
        )
    content = data[start.tell() :]
    if shape[0] * dtype.itemsize != len(content):
        raise ValueError(
            f"member {name!r} has {len(content)} bytes of numbers, its header says {shape[0]} numbers"
        )
    return np.frombuffer(content, dtype=dtype)
