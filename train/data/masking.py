"""Which tokens of a window are hidden, and by what: a pure function of (seed, epoch, window id, position).

Stateless integer hashing in wrap-around int64 arithmetic, on whatever device the tokens are on: a CPU and a
GPU draw the same masks, no generator has a state to save, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_prep.shard_format.tokenizer_info import TokenizerInfo
from train.errors import UserError

# Independent streams of the hash: which positions, what to do with each, which random token.
_SELECT, _REPLACE, _RANDOM = 1, 2, 3
_POSITION_BITS = 16  # the low bits of a sort key hold the position, so that no two keys are equal
_UNMASKABLE = 0x7FF << 52  # above every other sort key; as a double, infinity
_UNIT = 1 << 52  # (k + 0.5) / _UNIT is exact, and below 1, for every k below it


@dataclass(frozen=True)
class MaskedBatch:
    """A batch as the model sees it, on the device of the tokens it was made from."""

    input_ids: torch.Tensor
    """(batch, sequence_length) int64, masked."""
    positions: torch.Tensor
    """(batch, n) int64, ascending within a row: where the objective asks for the original token."""
    targets: torch.Tensor
    """(batch, n) int64, the original tokens at `positions`."""
    valid: torch.Tensor
    """(batch, n) bool; False only where a window has fewer than n maskable positions."""


class NoMasking:
    """Leaves the text as it is: for objectives of which no term predicts tokens."""

    num_masked = 0

    def __call__(self, input_ids: torch.Tensor, window_ids: torch.Tensor, epoch: int) -> MaskedBatch:
        """Arguments as `Masker`'s; a batch without masked positions."""
        tokens = input_ids.long()
        return MaskedBatch(tokens, tokens[:, :0], tokens[:, :0], tokens[:, :0].bool())


def continuation_table(pieces: Sequence[str | None], special_ids: Sequence[int]) -> np.ndarray:
    """(V,) bool: True where a piece continues the word of the piece before it.

    Args:
        pieces: the vocabulary by id, None at ids without a piece. WordPiece marks continuations (##ing);
            byte-level BPE and SentencePiece mark the starts of words instead.
    Raises:
        UserError: the vocabulary marks neither.
    """
    present = [piece or "" for piece in pieces]
    if any(piece.startswith("##") and len(piece) > 2 for piece in present):
        table = np.array([piece.startswith("##") and len(piece) > 2 for piece in present])
    else:
        start = next((mark for mark in ("Ġ", "▁") if any(piece.startswith(mark) for piece in present)), None)
        if start is None:
            raise UserError(
                "masking.whole_word is on, but the vocabulary marks no words (##, Ġ, ▁): turn it off"
            )
        table = np.array([piece != "" and not piece.startswith(start) for piece in present])
    table[list(special_ids)] = False
    return table


class Masker:
    """Dynamic masking after BERT (Devlin et al. 2019, arXiv:1810.04805, section 3.1) with exact counts.

    Of the chosen positions 80 % become [MASK], 10 % a random ordinary token, 10 % stay.

    Args:
        tokenizer: special tokens are never chosen and never a random replacement.
        sequence_length: L; n = round(probability * L) positions are chosen in every window.
        seed: 0 <= seed < 2**64.
        probability: share of the sequence, [CLS] and [SEP] counted in.
        whole_word: (V,) bool, see continuation_table: whole words are chosen, in random order, until n
            positions are; the last word may be masked in its first pieces only.
        histogram: (V,) int64 counts of the tokens in the corpus: positions are drawn without replacement
            with weights count**-smoothing, as in the original code. With `whole_word` a word has the
            weight of its first piece.
        smoothing: used with `histogram` only.
        length_key: the setting that L comes from, for messages.
    Raises:
        UserError: n is not between 1 and L - 2, or L above 65,535.
    """

    def __init__(
        self,
        tokenizer: TokenizerInfo,
        sequence_length: int,
        seed: int,
        probability: float = 0.15,
        whole_word: np.ndarray | None = None,
        histogram: np.ndarray | None = None,
        smoothing: float = 0.7,
        length_key: str = "data.sequence_length",
    ) -> None:
        self.num_masked = round(probability * sequence_length)
        if not 1 <= self.num_masked <= sequence_length - 2:
            raise UserError(
                f"masking.probability {probability} of {length_key} {sequence_length} is "
                f"{self.num_masked} positions: choose a probability that gives 1 to {sequence_length - 2}"
            )
        if sequence_length >= 1 << _POSITION_BITS:
            raise UserError(f"{length_key} is {sequence_length}: at most {(1 << _POSITION_BITS) - 1}")
        self.sequence_length = sequence_length
        self.mask_id = tokenizer.mask_id
        self._seed = seed
        size = tokenizer.vocab_size
        special = torch.zeros(size, dtype=torch.bool)
        special[list(tokenizer.special_ids)] = True
        tables = {
            "special": special,
            "ordinary": torch.nonzero(~special).squeeze(1),
            "position": torch.arange(sequence_length),
        }
        if whole_word is not None:
            tables["continues"] = torch.from_numpy(whole_word)
        if histogram is not None:
            tables["rarity"] = torch.from_numpy(np.maximum(histogram, 1.0) ** smoothing)
        self._tables = {torch.device("cpu"): tables}

    def __call__(self, input_ids: torch.Tensor, window_ids: torch.Tensor, epoch: int) -> MaskedBatch:
        """Mask a batch on its own device without waiting for it.

        Args:
            input_ids: (batch, sequence_length) int32 or int64 windows.
            window_ids: (batch,) int64, on the same device.
            epoch: the epoch the windows were cut in.
        """
        tables = self._on(input_ids.device)
        tokens = input_ids.long()
        special = tables["special"][tokens]
        keys = self._sort_keys(tokens, special, window_ids, epoch, tables)
        chosen = torch.topk(keys, self.num_masked, dim=1, largest=False, sorted=False).indices
        positions = torch.sort(chosen, dim=1).values
        targets = torch.gather(tokens, 1, positions)
        valid = ~torch.gather(special, 1, positions)

        lot = self._hash(_REPLACE, window_ids, positions, epoch) & (_UNIT - 1)
        ordinary = tables["ordinary"]
        # Multiply-shift: uniform over the ordinary ids to within 2**-31.
        draw = self._hash(_RANDOM, window_ids, positions, epoch) & 0x7FFFFFFF
        random_tokens = ordinary[(draw * len(ordinary)) >> 31]
        shown = torch.where(lot < _UNIT // 10 * 8, self.mask_id, targets)
        shown = torch.where(lot >= _UNIT // 10 * 9, random_tokens, shown)
        shown = torch.where(valid, shown, targets)
        return MaskedBatch(torch.scatter(tokens, 1, positions, shown), positions, targets, valid)

    def _sort_keys(
        self,
        tokens: torch.Tensor,
        special: torch.Tensor,
        window_ids: torch.Tensor,
        epoch: int,
        tables: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """(batch, L) int64 >= 0, distinct in a row: the n smallest are masked."""
        position = tables["position"]
        # A uniform double in (0, 1) with 52 random bits; an exponential race (-log u / weight) draws without
        # replacement with the given weights. The bits of positive doubles sort like the doubles.
        uniform = ((self._hash(_SELECT, window_ids, position, epoch) & (_UNIT - 1)).double() + 0.5) / _UNIT
        if "rarity" in tables:
            uniform = -torch.log(uniform) * tables["rarity"][tokens]
        keys = uniform.view(torch.int64)
        if "continues" in tables:
            # Every piece of a word has the key of the word's first piece. Behind a special token a word begins: the
            # rest of one that the window cuts, or a document's first, which byte-level BPE does not mark.
            continues = tables["continues"][tokens] & ~special.roll(1, dims=1)
            first = torch.where(continues, 0, position)
            keys = torch.gather(keys, 1, torch.cummax(first, dim=1).values)
        keys = torch.where(special, _UNMASKABLE, keys)
        return keys >> _POSITION_BITS << _POSITION_BITS | position

    def _hash(
        self, stream: int, window_ids: torch.Tensor, position: torch.Tensor, epoch: int
    ) -> torch.Tensor:
        """(batch, positions) int64 of 64 random bits; `position` is (positions,) or (batch, positions)."""
        key = _mix_int(_mix_int(_mix_int(self._seed) + epoch) + stream)
        window = _mix(window_ids * _signed(0x9E3779B97F4A7C15) + _signed(key))
        return _mix(window.unsqueeze(1) + (position + 1) * _signed(0xD1342543DE82EF95))

    def _on(self, device: torch.device) -> dict[str, torch.Tensor]:
        if device not in self._tables:
            tables = self._tables[torch.device("cpu")]
            self._tables[device] = {name: table.to(device) for name, table in tables.items()}
        return self._tables[device]


def _signed(value: int) -> int:
    """The int64 with the bits of `value` modulo 2**64."""
    return (value + 2**63) % 2**64 - 2**63


def _mix_int(value: int) -> int:
    """SplitMix64 on a Python integer; _mix is the same on tensors."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def _mix(value: torch.Tensor) -> torch.Tensor:
    """SplitMix64 (Steele et al. 2014) elementwise on int64, whose products wrap around."""
    value = value + _signed(0x9E3779B97F4A7C15)
    value = (value ^ _shift(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shift(value, 31)


def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift: torch's >> copies the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
