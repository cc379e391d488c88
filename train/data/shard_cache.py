"""Shards from elsewhere, kept in a local folder that any number of ranks and hosts may share.

A file's name holds the sha256 that the manifest promises, so that two corpora whose shards have the same names
never mix; fsspec's own caches name files by their URL, and keep what a torn reading left.
"""

from __future__ import annotations

import contextlib
import errno
import time
from pathlib import Path

from data_prep.shard_format.files import new_file
from data_prep.shard_format.manifest import ShardInfo
from data_prep.shard_format.remote import read_bytes
from train.errors import UserError

# A file is written at once, when the shard is in memory: a partial one as old as this was left by a killed process.
_STALE_S = 3600.0


class ShardCache:
    """Files of shards by content.

    Args:
        folder: made when the first shard is kept.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        with contextlib.suppress(OSError):
            for partial in self.folder.glob(".*.partial"):
                with contextlib.suppress(OSError):
                    if time.time() - partial.stat().st_mtime > _STALE_S:
                        partial.unlink()

    def path(self, shard: ShardInfo) -> Path:
        """Where a shard's file is kept."""
        return self.folder / f"{shard.sha256[:16]}-{shard.name}"

    def get(self, shard: ShardInfo) -> bytearray | None:
        """The file of a shard; None where it is not here, or has another size. UserError where it cannot be read."""
        try:
            data = read_bytes(str(self.path(shard)), shard.bytes)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ESTALE:  # NFS: another host has just replaced it
                return None
            raise self._unusable(error) from None
        return data if len(data) == shard.bytes else None

    def put(self, shard: ShardInfo, data: bytes | bytearray) -> None:
        """Keep the file of a shard; it appears whole, in one step.

        Raises:
            UserError: there is no room, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # One whose clock is hours ahead takes this partial file for a killed process's: the next reader keeps it.
            with (
                contextlib.suppress(FileNotFoundError),
                new_file(self.path(shard), binary=True, shared=True) as file,
            ):
                file.write(data)
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: OSError) -> UserError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room there, or choose" if full else "choose"
        return UserError(
            f"shards cannot be kept in data.cache_dir {self.folder} ({error}): {remedy} another folder, or none"
        )
