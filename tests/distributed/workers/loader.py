"""What the ranks of test_loader.py do."""

from __future__ import annotations

import numpy as np
import torch.distributed as dist

from data_prep.shard_format.manifest import Manifest
from train.data.loader import BatchLoader
from train.data.masking import Masker

SETTINGS = {"sequence_length": 16, "global_batch_size": 32, "seed": 3, "lanes": 16}
# (first step, step after the last): from the start, a restart within an epoch, one across its border.
RANGES = ((0, 40), (25, 40), (70, 120))


def masked_rows(folder: str, micro_batch_size: int, rank: int, world_size: int) -> dict[int, bytes]:
    """By step, this rank's share of it as the model would see it, for all of RANGES."""
    manifest = Manifest.load(folder)
    loader = BatchLoader(
        folder, manifest, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size, **SETTINGS
    )
    masker = Masker(manifest.tokenizer, 16, SETTINGS["seed"], histogram=np.load(f"{folder}/histogram.npy"))
    rows: dict[int, bytes] = {}
    for start, stop in RANGES:
        seen: dict[int, bytes] = {}
        for batch in loader.batches(start, stop):
            masked = masker(batch.input_ids, batch.window_ids, batch.epoch)
            parts = [masked.input_ids, masked.positions, masked.targets, batch.window_ids.unsqueeze(1)]
            table = np.concatenate([part.numpy() for part in parts], axis=1)
            seen[batch.step] = seen.get(batch.step, b"") + table.tobytes()
        assert list(seen) == list(range(start, stop))
        assert all(rows.setdefault(step, content) == content for step, content in seen.items())
    return rows


def serve(folder: str, plans: list[tuple[int, int]]) -> list[dict[int, bytes]]:
    """The rows of this process as a rank of each (world size, micro batch size).

    One launch serves all plans, because starting ranks costs more than all they do: in a plan of a smaller
    world the first ranks take part.
    """
    rank = dist.get_rank()
    return [masked_rows(folder, micro, rank, world) for world, micro in plans if rank < world]
