"""What must hold of the shards before anything is trained.

Every refusal is a ValueError that names the thing and the remedy.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from data_prep.shard_format.manifest import Manifest, ShardInfo
from train.data.shard_cache import ShardCache
from train.data.shard_reader import read_shard, shard_tokens
from train.data.shard_sizes import check_shard_sizes
from train.data.shard_streams import Readings
from train.errors import UserError

_THREADS = 8


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

    Sizes are compared without reading the shards, by every rank, where they can be asked for (shard_sizes.py).
    verify="full" also reads rank r's share of the shards, every world_size-th from the r-th on: sha256, and what
    `shard_tokens` asks of the tokens (data_prep/verify_shards.py asks more). All ranks together read the corpus
    once; a bad shard is met by one of them.

    Memory with verify="full": up to _THREADS shards at a time, each with its file, its tokens and a byte
    for every token: about 2.5 times the size of a shard, 160 MB for the usual shards of 8 MB.

    Args:
        splits: the splits to check; all by default.
        cache: where shards that are not local are kept, so that they are fetched once for this and for use.
    Raises:
        UserError: names the first bad shard in the manifest's order, what is wrong and what to do.
    """
    if verify not in ("size", "full"):
        raise UserError(f"data.verify is {verify!r}: use size or full")
    chosen = [shard for split in splits or tuple(manifest.splits) for shard in manifest.splits[split]]
    twice = [name for name, count in Counter(shard.name for shard in chosen).items() if count > 1]
    if twice:
        raise UserError(f"the manifest lists shard {twice[0]} twice: write the shards again")

    check_shard_sizes(shards, chosen)
    if verify == "full":
        _read_all(shards, manifest, chosen[rank::world_size], cache)


def _read_all(shards: str, manifest: Manifest, chosen: list[ShardInfo], cache: ShardCache | None) -> None:
    readings = Readings()

    def read(shard: ShardInfo) -> None:
        data = read_shard(shards, shard, verify="full", cache=cache, readings=readings)
        shard_tokens(data, shard, manifest.tokenizer)

    pool = ThreadPoolExecutor(_THREADS)
    try:
        for _ in pool.map(read, chosen):
            pass
    finally:
        readings.end()  # an error, or an interrupt, waits for no other shard
        pool.shutdown(cancel_futures=True)
