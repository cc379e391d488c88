"""What must hold of the shards before anything is trained.

Every error is a UserError that names the shard, what is wrong and what to do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from data_prep.shard_format.manifest import Manifest, ShardInfo, shard_url
from data_prep.shard_format.remote import file_size, folder_sizes
from train.data.prefetch import ReadAhead
from train.data.shard_cache import ShardCache
from train.data.shards import check_size, read_histogram, read_shard, shard_tokens, unreadable

Item = TypeVar("Item")

_READER_THREADS = 8
_SIZE_THREADS = 32


def check_shards(
    shards: str,
    manifest: Manifest,
    verify: str = "size",
    *,
    splits: tuple[str, ...] | None = None,
    rank: int = 0,
    world_size: int = 1,
    cache: ShardCache | None = None,
) -> None:
    """Refuse shards that are missing, truncated or (verify="full") altered.

    Sizes are compared without reading the shards, by every rank, where they can be asked for. verify="full" also
    reads rank r's share of the shards, every world_size-th from the r-th on: sha256, and what `shard_tokens` asks
    of the tokens (data_prep/verify_shards.py asks more); and the token histogram. All ranks together read
    the corpus once; a bad shard is found by one of them.

    Memory with verify="full": up to _READER_THREADS shards at a time, each with its file, its tokens and a byte
    for every token: about 2.5 times the size of a shard, 160 MB for the usual shards of 8 MB.

    Args:
        splits: the splits to check; all by default.
        cache: where shards that are not local are kept, so that they are fetched once for this and for use.
    Raises:
        UserError: names the first bad shard in the manifest's order, what is wrong and what to do.
    """
    chosen = [shard for split in splits or tuple(manifest.splits) for shard in manifest.splits[split]]
    check_shard_sizes(shards, chosen)
    if verify == "full":

        def read(shard: ShardInfo) -> None:
            data = read_shard(shards, shard, cache=cache)
            shard_tokens(data, shard, manifest.tokenizer)

        _for_each(read, chosen[rank::world_size], _READER_THREADS)
        read_histogram(shards, manifest)  # small: by every rank


def check_shard_sizes(shards: str, infos: Sequence[ShardInfo]) -> None:
    """Refuse missing, truncated or grown shards, the first of them in the order given.

    Sizes come from the files, from one listing of a store's folder, or from one request for each shard. A server
    need not give the size of a file: it is compared when the shard is read.

    Raises:
        UserError: names the shard, what is wrong and what to do.
    """
    if not infos:
        return
    listed = folder_sizes(shards.rstrip("/"))

    def check(shard: ShardInfo) -> None:
        url = shard_url(shards, shard.name)
        try:
            if listed is not None and shard.name not in listed:
                raise FileNotFoundError
            size = file_size(url) if listed is None else listed[shard.name]
        except OSError as error:
            raise unreadable(f"shard {shard.name}", url, error) from None
        if size is not None:
            check_size(shard, size, url)

    _for_each(check, infos, _SIZE_THREADS)


def _for_each(function: Callable[[Item], None], items: Sequence[Item], num_threads: int) -> None:
    """Call `function` with each item; the error of the first item that has one does not wait for later ones."""

    def call(index: int) -> None:
        function(items[index])

    with ReadAhead[int, None](call, min(num_threads, len(items))) as calls:
        for index in range(len(items)):
            calls.request(index, index)
        for index in range(len(items)):
            calls.get(index, threading.Event())
