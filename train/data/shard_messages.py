"""What is said of a shard that cannot be used: its name, where it lies, what is wrong and what to do."""

from __future__ import annotations

import re

from data_prep.shard_format.manifest import ShardInfo, is_remote
from train.errors import UserError

REMEDY = "fetch or write the shards again; data_prep/verify_shards.py checks them all"


def unreadable(name: str, url: str, error: Exception) -> UserError:
    """The error of a file called `name` that is missing or cannot be read, because of `error`."""
    missing = isinstance(error, FileNotFoundError) and not is_remote(url)
    ended = re.search(r": exit (-?\d+) \(read\)", str(error))  # webdataset shows its Popen arguments, too
    words = " ".join(str(error).split()) or type(error).__name__  # a server's answer may hold line ends
    reason = f"its command ended with exit code {ended[1]}" if ended else words
    what = "is missing" if missing else f"cannot be read ({reason})"
    return UserError(f"{name} at {url} {what}: {REMEDY}")


def check_size(shard: ShardInfo, size: int, url: str) -> None:
    """UserError where `size` is not the manifest's."""
    if size < shard.bytes:
        raise UserError(f"shard {shard.name} at {url} is truncated, {size} of {shard.bytes} bytes: {REMEDY}")
    if size > shard.bytes:
        raise UserError(
            f"shard {shard.name} at {url} was altered, it is longer than {shard.bytes} bytes: {REMEDY}"
        )
