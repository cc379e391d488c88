"""Texts to token ids, which examples make a batch, and how they are padded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from train.errors import UserError
from train.finetuning.data.examples import Examples

ENCODED_TOGETHER = 2000
POOL_BATCHES = 50
"""Within so many batches' worth of examples, drawn at random, those of like length come together."""
Features = Mapping[str, Any]
"""One example: "input_ids", perhaps "token_type_ids", each a sequence of ints; "labels"; "soft_labels"."""


def encode(
    tokenizer: Any, examples: Examples, max_length: int, token_types: bool
) -> list[dict[str, np.ndarray]]:
    """ "input_ids", and with `token_types` "token_type_ids", each (length,) int32, of every example.

    A pair that is too long loses tokens of its longer text first.
    """
    encoded: list[dict[str, np.ndarray]] = []
    for start in range(0, len(examples), ENCODED_TOGETHER):
        second = examples.second[start : start + ENCODED_TOGETHER] if examples.second is not None else None
        chunk = tokenizer(
            examples.first[start : start + ENCODED_TOGETHER],
            second,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=token_types,
        )
        names = ("input_ids", "token_type_ids") if token_types else ("input_ids",)
        columns = [[np.asarray(ids, dtype=np.int32) for ids in chunk[name]] for name in names]
        encoded += [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return encoded


def check_pairs(name: str, tokenizer: Any) -> None:
    """UserError where a tokenizer puts nothing between the two texts of a pair."""
    ids = tokenizer("a", "a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    single = tokenizer("a")["input_ids"]
    if len(ids) <= len(single) + len(without):
        raise UserError(
            f"{name}: its tokenizer gives a pair of texts as {tokenizer.convert_ids_to_tokens(ids)}, with nothing "
            "between them; give its tokenizer.json a pair template, as BERT's [CLS] A [SEP] B [SEP]"
        )


def check_room(name: str, tokenizer: Any, max_length: int, is_pair: bool) -> None:
    """UserError where `max_length` is all special tokens, and the model would see nothing of the texts."""
    special = tokenizer.num_special_tokens_to_add(pair=is_pair)
    least = special + (2 if is_pair else 1)
    if max_length < least:
        raise UserError(
            f"--max-length is {max_length}, of which {name} takes {special} for special tokens; give at least {least}"
        )


def epoch_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, group_by_length: bool
) -> list[np.ndarray]:
    """The batches of one epoch, a pure function of its arguments: the same ones after a resume.

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
