"""What a corpus of shards is known by, from its manifest: digests, and the windows that it holds out."""

from __future__ import annotations

from data_prep.shard_format.manifest import Manifest
from train.data.order import windows_per_shard
from train.data.shards import UNREADABLE, histogram_digest
from train.errors import UserError

SHARDS, HISTOGRAM = "data.shards", "data.token_histogram"
"""Names in RUN/inputs.json."""


def read_corpus_digests(shards: str) -> dict[str, str]:
    """`corpus_digests` of the manifest that lies there."""
    try:
        return corpus_digests(shards, Manifest.load(shards))
    except (OSError, UserError) as error:
        return corpus_digests(shards, error)


def corpus_digests(shards: str, found: Manifest | Exception) -> dict[str, str]:
    """Digests of the shards' manifest and of their token histogram, which decides the masks.

    Args:
        found: the manifest, or why there is none.
    Returns:
        By name; UNREADABLE where there is none, of which the build says more.
    """
    if not isinstance(found, Manifest):
        return {SHARDS: UNREADABLE, HISTOGRAM: UNREADABLE}
    return {SHARDS: found.digest(), HISTOGRAM: histogram_digest(shards, found)}


def num_heldout_windows(manifest: Manifest, sequence_length: int) -> int:
    """Whole windows in the held-out split."""
    return sum(windows_per_shard([shard.tokens for shard in manifest.splits["heldout"]], sequence_length))


def without_heldout_windows(shards: str, manifest: Manifest, sequence_length: int) -> str | None:
    """What a corpus without held-out windows of this length means, and the remedy; None where it has some."""
    if num_heldout_windows(manifest, sequence_length):
        return None
    tokens = sum(shard.tokens for shard in manifest.splits["heldout"])
    return (
        f"{shards} holds out no window of {sequence_length} tokens (its held-out split has {tokens:,} tokens), so that "
        "no held-out score of any model can be taken; write the shards again with data_prep/write_shards.py, with a "
        "larger --heldout-fraction"
    )
