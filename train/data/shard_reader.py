"""One shard's bytes, from wherever webdataset can open it, and the tokens in them.

A shard is input from outside: its tar may be hostile. Nothing is unpacked to a file, followed as a link or
unpickled; a member is a plain file whose NumPy header announces one row of unsigned integers, or an error.
Every message names the shard and what to do.
"""

from __future__ import annotations

import hashlib

import numpy as np

from data_prep.shard_format.manifest import (
    Manifest,
    ShardInfo,
    TokenizerInfo,
    is_remote,
    npy_array,
    shard_url,
    token_blocks,
    token_dtype,
)
from train.data.shard_cache import ShardCache
from train.data.shard_messages import REMEDY, check_size, unreadable
from train.data.shard_streams import Readings
from train.errors import UserError

# A member holds a document at least, and costs a tar header, a pax header, an .npy header and padding.
_OVERHEAD_PER_DOCUMENT = 4096
_TAR_TRAILER = 64 * 1024
_LONGEST_NPY_HEADER = 256


def url_of(shards: str, shard: ShardInfo) -> str:
    """Where a shard lies."""
    return shard_url(shards, shard.name)


def read_shard(
    shards: str,
    shard: ShardInfo,
    *,
    verify: str = "size",
    cache: ShardCache | None = None,
    readings: Readings | None = None,
) -> bytearray:
    """The whole file of a shard.

    Args:
        readings: what ends the reading when its user leaves; None: nobody does.
    Raises:
        UserError: it is missing, cannot be read, or its size (with verify="full" its sha256) is not the
            manifest's.
    """
    url = url_of(shards, shard)
    readings = readings or Readings()
    if cache is not None and is_remote(url):
        data = cache.read(url, shard, readings, verify=verify)
    else:
        try:
            data = readings.read_up_to(url, shard.bytes)
        except OSError as error:
            raise unreadable(f"shard {shard.name}", url, error) from None
        check_size(shard, len(data), url)
    if verify == "full" and hashlib.sha256(data).hexdigest() != shard.sha256:
        raise UserError(
            f"shard {shard.name} at {url} was altered, its sha256 is not the manifest's: {REMEDY}"
        )
    return data


def read_histogram(shards: str, manifest: Manifest) -> np.ndarray:
    """(V,) int64 >= 0: how often each token stands in the train split.

    Raises:
        UserError: the file is missing, cannot be read, or holds something else.
    """
    url, size = shard_url(shards, manifest.token_histogram), manifest.tokenizer.vocab_size
    what = f"token histogram {manifest.token_histogram}"
    longest = 8 * size + _LONGEST_NPY_HEADER
    try:
        data = Readings().read_up_to(url, longest)
    except OSError as error:
        raise unreadable(what, url, error) from None
    try:
        counts = npy_array(memoryview(data)[: longest + 1], "it", np.dtype("<i8"))
    except ValueError as error:
        raise UserError(f"{what} at {url} is damaged ({error}): {REMEDY}") from None
    if len(counts) != size or counts.min(initial=0) < 0:
        raise UserError(
            f"{what} at {url} has {len(counts)} counts, the lowest {counts.min(initial=0)}: "
            f"it must have {size}, none below 0; {REMEDY}"
        )
    return counts


def shard_tokens(data: bytearray, shard: ShardInfo, tokenizer: TokenizerInfo) -> np.ndarray:
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
    except ValueError as error:
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
