"""What must hold of the shards before anything is trained.

Every refusal is a ValueError that names the thing and the remedy.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from data_prep.shard_format import Manifest, ShardInfo
from train.shard_reader import ShardCache, check_shard_size, read_shard, shard_tokens

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

    Sizes of local and http(s) files are compared without reading them, by every rank; through a pipe a size
    is known only by reading, which then happens when the shard is used. verify="full" also reads rank r's
    share of the shards, every world_size-th from the r-th on: sha256, and every promise of the format. All
    ranks together read the corpus once; a bad shard is met by one of them.

    Memory with verify="full": up to _THREADS shards at a time, each with its file, its tokens and a byte
    for every token: about 2.5 times the size of a shard, 160 MB for the usual shards of 8 MB.

    Args:
        splits: the splits to check; all by default.
        cache: where shards that are not local are kept, so that they are fetched once for this and for use.
    Raises:
        ValueError: names the first bad shard in the manifest's order, what is wrong and what to do.
    """
    if verify not in ("size", "full"):
        raise ValueError(f"data.verify is {verify!r}: use size or full")
    chosen = [shard for split in splits or tuple(manifest.splits) for shard in manifest.splits[split]]
    twice = [name for name, count in Counter(shard.name for shard in chosen).items() if count > 1]
    if twice:
        raise ValueError(f"the manifest lists shard {twice[0]} twice: write the shards again")

    def read(shard: ShardInfo) -> None:
        shard_tokens(read_shard(shards, shard, verify=verify, cache=cache), shard, manifest.tokenizer)

    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(lambda shard: check_shard_size(shards, shard), chosen):
            pass
        for _ in pool.map(read, chosen[rank::world_size] if verify == "full" else []):
            pass
