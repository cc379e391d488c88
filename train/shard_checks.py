"""What must hold between the shards, the model and the ranks before anything is trained.

Every refusal is a ValueError that names the thing and the remedy.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

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
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(check, chosen):
            pass


def check_model(
    manifest: Manifest,
    sequence_length: int,
    *,
    tokenizer_fingerprint: str | None,
    vocab_size: int,
    max_positions: int,
    name: str = "the teacher",
) -> None:
    """Refuse a model that does not read the shards' tokens or windows of `sequence_length`.

    Args:
        tokenizer_fingerprint: of the tokenizer that came with the model; None where it has none, and then
            only the vocabulary's size is compared.
        vocab_size: rows of the model's embedding table; rows beyond the tokenizer's are padding.
        max_positions: positions the model can use (RoBERTa's table has two rows more than that).
    """
    tokenizer = manifest.tokenizer
    if tokenizer_fingerprint is not None and tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"the shards' tokenizer (fingerprint {tokenizer.fingerprint[:12]}) is not that of {name} "
            f"({tokenizer_fingerprint[:12]}): write the shards with --tokenizer and the folder of {name}"
        )
    unknown = tokenizer_fingerprint is None and vocab_size != tokenizer.vocab_size
    if unknown or vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the shards' vocabulary has {tokenizer.vocab_size} entries, that of {name} {vocab_size}: "
            f"write the shards with the tokenizer of {name}"
        )
    if sequence_length > max_positions:
        raise ValueError(
            f"data.sequence_length is {sequence_length}, but {name} has {max_positions} positions: "
            f"use at most {max_positions}"
        )


def check_same_manifest(manifest: Manifest) -> None:
    """Refuse, on every rank, ranks that read different manifests. Collective; alone, it does nothing."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    digests: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, manifest.digest())
    different = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise ValueError(
            f"ranks {', '.join(different)} see other shards than rank 0 (their manifest.json differs): "
            "give every host the same data.shards"
        )
