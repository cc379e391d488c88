"""Which examples make a batch, and how they are padded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

POOL_BATCHES = 50
"""Within so many batches' worth of examples, drawn at random, those of like length come together."""
Features = Mapping[str, Any]
"""One example: "input_ids", perhaps "token_type_ids", each a sequence of ints; "labels"; "soft_labels"."""


def epoch_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, group_by_length: bool
) -> list[np.ndarray]:
    """The batches of one epoch, a pure function of its arguments: a resumed epoch meets the same ones.

    Args:
        lengths: (N,) tokens of each example.
    Returns:
        Arrays of indices into `lengths`, which hold every index once; one of them may be shorter.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    if group_by_length:
        pool = POOL_BATCHES * batch_size
        pools = [order[start : start + pool] for start in range(0, len(order), pool)]
        order = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in pools])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[index] for index in random.permutation(len(batches))] if group_by_length else batches


class EpochBatches:
    """`epoch_batches` as the batch sampler of a torch DataLoader; whoever trains sets `epoch`."""

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, group_by_length: bool) -> None:
        self._arguments = (lengths, batch_size, seed)
        self._group_by_length = group_by_length
        self.batch_size = batch_size
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self._arguments[0]) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in epoch_batches(*self._arguments, self.epoch, self._group_by_length):
            yield batch.tolist()


class Padding:
    """Collate examples to the longest of them. Without padding there is no mask: attention is faster then."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, examples: Sequence[Features]) -> dict[str, torch.Tensor]:
        lengths = [len(example["input_ids"]) for example in examples]
        shape = (len(examples), max(lengths))
        batch = {}
        for name, padding in (("input_ids", self._pad_id), ("token_type_ids", 0)):
            if name in examples[0]:
                padded = np.full(shape, padding, dtype=np.int64)
                for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
                    padded[row, :length] = example[name]
                batch[name] = torch.from_numpy(padded)
        if min(lengths) < shape[1]:
            places = np.arange(shape[1])[None, :] < np.asarray(lengths)[:, None]
            batch["attention_mask"] = torch.from_numpy(places.astype(np.int64))
        for name in ("labels", "soft_labels"):
            if name in examples[0]:
                batch[name] = torch.from_numpy(np.stack([example[name] for example in examples]))
        return batch
