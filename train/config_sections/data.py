"""The shards, and what of them is hidden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_prep.shard_format.remote import is_remote
from train.config_sections.checks import refuse, require_at_most, require_positive

MAX_LANES = 65_536


@dataclass(frozen=True)
class DataConfig:
    """Where the shards are and in which order they are read."""

    shards: str = "shards"
    """Folder or URL of the shards that data_prep/write_shards.py made: a path, http(s), s3, gs, az, abfs or hf
    (s3, gs, az and abfs need requirements-remote.txt)."""

    sequence_length: int = 512
    """Tokens in a sequence, [CLS] and [SEP] included."""

    seed: int = 0
    """Seed of the data order, of the masks and of dropout."""

    lanes: int = 64
    """Parallel readers that an epoch is divided among: part of the data order's definition. The largest
    number of ranks is the largest divisor of the global batch size up to this."""

    verify: Literal["size", "full"] = "size"
    """What is checked before training: the size of every shard, or its sha256 as well, which each reading checks."""

    cache_dir: str | None = None
    """Folder in which shards from URLs are kept; null: they are read anew in every epoch."""

    def __post_init__(self) -> None:
        require_positive(self, "data", "lanes")
        require_at_most(self, "data", MAX_LANES, "lanes")
        if not self.sequence_length >= 8:
            refuse(self, "data.sequence_length", "give at least 8")
        if not isinstance(self.shards, str):
            refuse(self, "data.shards", "give the folder or URL of shards")
        remote = is_remote(self.shards)  # refuses what is not read
        if self.cache_dir is not None and not remote:
            refuse(
                self, "data.cache_dir", f"has no effect with the local data.shards={self.shards!r}; remove it"
            )
        if not 0 <= self.seed < 2**31:
            refuse(self, "data.seed", "give a number from 0 to 2147483647")


@dataclass(frozen=True)
class MaskingConfig:
    """Which tokens the model must guess (drawn anew in every epoch)."""

    probability: float = 0.15
    """Share of a sequence's positions that are chosen; of these 80 % become [MASK], 10 % a random token."""

    smoothing: float = 0.7
    """A token is chosen with probability proportional to count**-smoothing (the original code's 0.7);
    0 chooses every token alike."""

    whole_word: bool = False
    """Choose whole words rather than pieces of words."""

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            refuse(self, "masking.probability", "give a share between 0 and 1")
        if not 0 <= self.smoothing <= 2:
            refuse(self, "masking.smoothing", "give a number from 0 to 2")
