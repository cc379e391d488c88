"""One shard's bytes, from a path or URL, and the tokens in them.

A shard is input from outside: its tar may be hostile. Nothing is unpacked to a file, followed as a link or
unpickled; a member is a plain file whose NumPy header announces one row of unsigned integers, or an error.
Every error names the shard, where it lies, what is wrong and what to do.
"""

from __future__ import annotations

import hashlib

import numpy as np

from data_prep.shard_format.blocks import npy_array, token_blocks
from data_prep.shard_format.manifest import Manifest, ShardInfo, shard_url, token_dtype
from data_prep.shard_format.remote import is_remote, read_bytes
from data_prep.shard_format.tokenizer_info import TokenizerInfo
from train.data.shard_cache import ShardCache
from train.errors import UserError, one_line

REMEDY = "fetch or write the shards again; data_prep/verify_shards.py checks them all"
# A member holds a document at least, and costs a tar header, a pax header, an .npy header and padding.
_OVERHEAD_PER_DOCUMENT = 4096
_TAR_TRAILER = 64 * 1024
_LONGEST_NPY_HEADER = 256
UNREADABLE = "unreadable"
"""In place of a digest."""


def read_shard(shards: str, shard: ShardInfo, *, cache: ShardCache | None = None) -> bytearray:
    """The whole file of a shard. Its sha256 takes some milliseconds, and a shard lasts for minutes.

    Args:
        cache: where shards that are not local are kept; one there whose sha256 is not the manifest's is read anew.
    Raises:
        UserError: it is missing, cannot be read or kept, or its size or sha256 is not the manifest's.
    """
    url = shard_url(shards, shard.name)
    if not is_remote(url):
        cache = None
    if cache is not None:
        kept = cache.get(shard)
        if kept is not None and _has_sha256(kept, shard):
            return kept
    data = _read(f"shard {shard.name}", url, shard.bytes)
    check_size(shard, len(data), url)
    if not _has_sha256(data, shard):
        raise UserError(
            f"shard {shard.name} at {url} was altered, its sha256 is not the manifest's: {REMEDY}"
        )
    if cache is not None:
        cache.put(shard, data)
    return data


def read_histogram(shards: str, manifest: Manifest) -> np.ndarray:
    """(V,) int64 >= 0: how often each token stands in the train split. It decides which tokens are masked.

    Raises:
        UserError: the file is missing, cannot be read, or is not the one that the manifest was written with: by its
            sha256, or, where an older manifest has none, by the number of tokens that it counts.
    """
    url, size = shard_url(shards, manifest.token_histogram), manifest.tokenizer.vocab_size
    what = f"token histogram {manifest.token_histogram}"
    data = _read(what, url, 8 * size + _LONGEST_NPY_HEADER)
    if manifest.token_histogram_sha256 not in (None, hashlib.sha256(data).hexdigest()):
        raise UserError(f"{what} at {url} was altered, its sha256 is not the manifest's: {REMEDY}")
    try:
        counts = npy_array(memoryview(data), "it", np.dtype("<i8"))
    except UserError as error:
        raise UserError(f"{what} at {url} is damaged ({error}): {REMEDY}") from None
    if len(counts) != size or counts.min(initial=0) < 0:
        raise UserError(
            f"{what} at {url} has {len(counts)} counts, the lowest {counts.min(initial=0)}: "
            f"it must have {size}, none below 0; {REMEDY}"
        )
    if manifest.token_histogram_sha256 is None:
        total, tokens = sum(counts.tolist()), sum(shard.tokens for shard in manifest.splits["train"])
        if total != tokens:
            raise UserError(
                f"{what} at {url} was altered, it counts {total} tokens where the train split has {tokens}: {REMEDY}"
            )
    return counts


def histogram_digest(shards: str, manifest: Manifest) -> str:
    """sha256 of the token histogram that `read_histogram` accepts; UNREADABLE where it accepts none.

    Where the manifest has it, nothing is read: `read_histogram` compares.
    """
    if manifest.token_histogram_sha256 is not None:
        return manifest.token_histogram_sha256
    try:
        return hashlib.sha256(read_histogram(shards, manifest).tobytes()).hexdigest()
    except (UserError, OSError):
        return UNREADABLE


def check_size(shard: ShardInfo, size: int, url: str) -> None:
    """UserError where `size` is not the manifest's."""
    if size < shard.bytes:
        raise UserError(f"shard {shard.name} at {url} is truncated, {size} of {shard.bytes} bytes: {REMEDY}")
    if size > shard.bytes:
        raise UserError(
            f"shard {shard.name} at {url} was altered, it is longer than {shard.bytes} bytes: {REMEDY}"
        )


def unreadable(what: str, url: str, error: OSError) -> UserError:
    """The error of a file that is missing or cannot be read, because of `error`."""
    reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({one_line(error)})"
    return UserError(f"{what} at {url} {reason}: {REMEDY}")


def _read(what: str, url: str, limit: int) -> bytearray:
    try:
        return read_bytes(url, limit)
    except OSError as error:
        raise unreadable(what, url, error) from None


def _has_sha256(data: bytes | bytearray, shard: ShardInfo) -> bool:
    return hashlib.sha256(data).hexdigest() == shard.sha256


def shard_tokens(data: bytes | bytearray, shard: ShardInfo, tokenizer: TokenizerInfo) -> np.ndarray:
    """(shard.tokens,) uint16 or uint32: the shard's blocks end to end.

    Raises:
        UserError: they are more or fewer than the manifest says, lie outside the vocabulary, are of another number
            of documents, or do not end with a whole one.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    limit = shard.tokens * dtype.itemsize + shard.documents * _OVERHEAD_PER_DOCUMENT + _TAR_TRAILER
    if len(data) > limit:
        raise UserError(
            f"shard {shard.name} has {len(data)} bytes, too many for its {shard.tokens} tokens: {REMEDY}"
        )
    try:
        blocks = token_blocks(data, dtype)
    except UserError as error:
        raise UserError(f"shard {shard.name} is not a shard of tokens ({error}): {REMEDY}") from None
    tokens = np.concatenate(blocks) if blocks else np.zeros(0, dtype)
    if len(tokens) != shard.tokens:
        raise UserError(
            f"shard {shard.name} holds {len(tokens)} tokens, not the manifest's {shard.tokens}: {REMEDY}"
        )
    highest = int(tokens.max(initial=0))
    if highest >= tokenizer.vocab_size:
        vocabulary = f"the vocabulary of {tokenizer.vocab_size}"
        raise UserError(f"shard {shard.name} holds token {highest}, beyond {vocabulary}: {REMEDY}")
    documents = int(np.count_nonzero(tokens == tokenizer.sep_id))
    if documents != shard.documents or (len(tokens) and tokens[-1] != tokenizer.sep_id):
        raise UserError(
            f"shard {shard.name} holds {documents} separators for the manifest's {shard.documents} documents "
            f"or does not end with one: {REMEDY}"
        )
    return tokens
