"""What must hold of the shards before anything is trained.

Every refusal is a ValueError that names the thing and the remedy.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from data_prep.shard_format import Manifest, ShardInfo
from train.shard_reader import check_shard_size, read_shard, shard_tokens

_THREADS = 8


def check_shards(
    shards: str, manifest: Manifest, verify: str = "size", *, splits: tuple[str, ...] | None = None
) -> None:
    """Refuse shards that are missing, truncated or (verify="full") altered.

    Sizes of local and http(s) files are compared without reading them; through a pipe a size is known only
    by reading, which then happens when the shard is used. verify="full" reads everything: sha256, and every
    promise of the format.

    Args:
        splits: the splits to check; all by default.
    Raises:
        ValueError: names the first bad shard in the manifest's order, what is wrong and what to do.
    """
    if verify not in ("size", "full"):
        raise ValueError(f"data.verify is {verify!r}: use size or full")

    def check(shard: ShardInfo) -> None:
        if verify == "full":
            shard_tokens(read_shard(shards, shard, verify=verify), shard, manifest.tokenizer)
        else:
            check_shard_size(shards, shard)

    chosen = [shard for split in splits or tuple(manifest.splits) for shard in manifest.splits[split]]
    twice = [name for name, count in Counter(shard.name for shard in chosen).items() if count > 1]
    if twice:
        raise ValueError(f"the manifest lists shard {twice[0]} twice: write the shards again")
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(check, chosen):
            pass
