"""Shards from elsewhere, kept in a local folder that any number of ranks and hosts may share.

A file's name holds the sha256 that the manifest promises, so that two corpora whose shards have the same names
never mix. It appears whole, in one step, and on the disk before its name does; webdataset's own FileCache
downloads without a limit, into a name that two hosts' processes may share, and keeps what a killed one left.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
import time
from pathlib import Path

from data_prep.shard_format.manifest import ShardInfo
from train.data.shard_messages import check_size, unreadable
from train.data.shard_streams import Readings
from train.errors import UserError

# A part is written at once, when the shard is in memory: one as old as this was left by a killed process.
_STALE_S = 3600.0


class ShardCache:
    """Files of shards by content.

    Args:
        folder: made when the first shard is fetched.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        with contextlib.suppress(OSError):
            for part in self.folder.glob(".*.part"):
                with contextlib.suppress(OSError):
                    if time.time() - part.stat().st_mtime > _STALE_S:
                        part.unlink()

    def path(self, shard: ShardInfo) -> Path:
        """Where a shard's file is kept."""
        return self.folder / f"{shard.sha256[:16]}-{shard.name}"

    def read(self, url: str, shard: ShardInfo, readings: Readings, *, verify: str) -> bytearray:
        """The whole file of a shard, fetched from `url` where it is not here yet.

        A file here of another size (with verify="full", of another sha256) is fetched again.

        Raises:
            UserError: it cannot be read or kept, or its size is not the manifest's.
        """
        path = self.path(shard)
        try:
            data = readings.read_up_to(str(path), shard.bytes)
        except FileNotFoundError:
            data = bytearray()
        except OSError as error:
            raise self._unusable(error) from None
        good = len(data) == shard.bytes
        if good and verify == "full":
            good = hashlib.sha256(data).hexdigest() == shard.sha256
        if not good:
            try:
                data = readings.read_up_to(url, shard.bytes)
            except OSError as error:
                raise unreadable(f"shard {shard.name}", url, error) from None
            check_size(shard, len(data), url)
            self._keep(path, data)
        return data

    def _keep(self, path: Path, data: bytearray) -> None:
        part = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(".part", f".{path.name}-", self.folder)
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(part, 0o644)
            os.replace(part, path)
        except OSError as error:
            if part is not None:
                with contextlib.suppress(OSError):
                    os.unlink(part)
            raise self._unusable(error) from None

    def _unusable(self, error: OSError) -> UserError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room there, or choose" if full else "choose"
        return UserError(
            f"shards cannot be kept in data.cache_dir {self.folder} ({error}): {remedy} another folder, or none"
        )
