"""The inside of a shard: token arrays as members of a tar, written and strictly read.

A shard is input from outside: its tar may be hostile. Nothing is unpacked to a file, followed as a link or
unpickled; a member is a plain file whose NumPy header announces one row of numbers, or an error.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from data_prep.shard_format.errors import UserError
from data_prep.shard_format.tar import tar_members

TOKENS_KEY = "tokens.npy"
BLOCK_TOKENS = 8192  # a member's tar and npy headers take about 900 bytes: 5 % of 8192 uint16
_SLICE = 1 << 20
_MEMBER_NAME = re.compile(rf"[^/.]+\.{re.escape(TOKENS_KEY)}")
_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([^']{1,16})', 'fortran_order': False, 'shape': \(([0-9, ]{0,64})\), \} *\n",
    re.DOTALL,
)


def write_shard(file: BinaryIO, prefix: str, documents: Iterable[np.ndarray]) -> tuple[int, int]:
    """Write documents (1-D token arrays, each ending with its separator) as one tar into `file`.

    Blocks of at least BLOCK_TOKENS tokens, the last one excepted. The same documents give the same bytes:
    those of `tarfile` and `np.save`, but without a copy of any document, which may be of many megabytes.

    Returns:
        (documents, tokens) written.
    """
    num_documents = num_tokens = size = 0
    for number, block in enumerate(blocks_of(documents)):
        block_tokens = sum(map(len, block))
        npy = io.BytesIO()
        shape = {"descr": block[0].dtype.str, "fortran_order": False, "shape": (block_tokens,)}
        np.lib.format.write_array_header_1_0(npy, shape)
        member = tarfile.TarInfo(f"{prefix}-{number:06d}.{TOKENS_KEY}")  # mtime, uid and gid stay 0
        member.size = npy.tell() + block_tokens * block[0].dtype.itemsize
        file.write(member.tobuf(tarfile.USTAR_FORMAT) + npy.getvalue())
        for document in block:
            file.write(np.ascontiguousarray(document).view(np.uint8).data)
        padding = -member.size % tarfile.BLOCKSIZE
        file.write(bytes(padding))
        size += tarfile.BLOCKSIZE + member.size + padding
        num_documents += len(block)
        num_tokens += block_tokens
    size += 2 * tarfile.BLOCKSIZE  # the end mark; then up to a whole record
    file.write(bytes(2 * tarfile.BLOCKSIZE + -size % tarfile.RECORDSIZE))
    return num_documents, num_tokens


def blocks_of(documents: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    block: list[np.ndarray] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document)
        if size >= BLOCK_TOKENS:
            yield block
            block, size = [], 0
    if block:
        yield block


def count_tokens(counts: np.ndarray, tokens: np.ndarray) -> None:
    """Add to `counts`, int64 (vocab_size,), how often each token stands in `tokens`, (n,) of any size."""
    for start in range(0, len(tokens), _SLICE):  # bincount turns what it counts into int64
        counts += np.bincount(tokens[start : start + _SLICE], minlength=len(counts))


def token_blocks(data: bytes | bytearray, dtype: np.dtype[Any] | None = None) -> list[np.ndarray]:
    """The arrays of a shard's members, in order, as views of `data`: 1-D, of `dtype` or else uint16 or uint32.

    Raises:
        UserError: it is no such tar, or not a whole one; the message names the member.
    """
    blocks = []
    for name, start, stop in tar_members(data):
        if not _MEMBER_NAME.fullmatch(name):
            raise UserError(f"member {name!r} is not called KEY.{TOKENS_KEY}")
        blocks.append(npy_array(memoryview(data)[start:stop], f"member {name!r}", dtype))
    return blocks


def npy_array(data: memoryview, name: str, dtype: np.dtype[Any] | None) -> np.ndarray:
    """(n,) view of an .npy file's numbers.

    The header is matched against what np.save writes: numpy's own reader evaluates it as Python, which is
    slower than all else here, raises what a hostile header likes and allocates before it looks.

    Args:
        dtype: what they must be; None for uint16 or uint32.
    Raises:
        UserError: it is anything else; the message begins with `name`.
    """
    header = _NPY_HEADER.match(data)
    if header is None or header.end() != 10 + int.from_bytes(data[8:10], "little"):
        raise UserError(f"{name} is not an .npy file of one array")
    found, shape = header[1].decode("latin-1"), header[2].decode()
    if dtype is None:
        dtype = np.dtype("<u4" if found == "<u4" else "<u2")
    if found != dtype.str or not re.fullmatch(r"\d{1,18},", shape):
        raise UserError(f"{name} is an array of {found}, shape ({shape}), not of {dtype.str} in one row")
    content = data[header.end() :]
    if int(shape[:-1]) * dtype.itemsize != len(content):
        raise UserError(f"{name} has {len(content)} bytes of numbers for a shape of ({shape})")
    return np.frombuffer(content, dtype=dtype)
