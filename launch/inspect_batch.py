"""Show what the model sees at a step: decoded text with its masks, and a digest of the global batch.

    python launch/inspect_batch.py --shards shards --step 1200
    python launch/inspect_batch.py --shards shards --step 1200 --world-size 8      the same digest
    python launch/inspect_batch.py --config runs/distilbert-base/config.yaml --step 1200 --show 20

The batch is rebuilt from the shards alone, through the trainer's own loader and masks; without --config and
--section.key=value it is that of the published recipe. The digest is sha256 over the global batch in lane
order: all masked input ids, then the masked positions, then the original tokens there, each as little-endian
int32. World size and micro batch size change who serves a row, never the digest.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.shard_format.required_packages import require_packages

require_packages()

from launch.common.cli import command_parser, parse_config, run_main
from train.config import Config
from train.data.order import check_fit
from train.errors import UserError

if TYPE_CHECKING:
    import torch

    from train.data.masking import MaskedBatch

LEGEND = (
    "[cat->MASK] is hidden, [cat->dog] is shown as another token, [cat] is shown as it is; "
    "the model must guess all three."
)
# Short names for what is looked at most; every other key of the recipe is taken as --section.key=value.
SHORT = {
    "shards": "data.shards",
    "sequence_length": "data.sequence_length",
    "seed": "data.seed",
    "global_batch_size": "training.global_batch_size",
    "micro_batch_size": "training.micro_batch_size",
}


@dataclass(frozen=True)
class Row:
    """One sequence of the global batch, on the CPU."""

    rank: int
    micro_step: int
    window_id: int
    masked: MaskedBatch
    """With a batch dimension of 1."""


@dataclass(frozen=True)
class GlobalBatch:
    """A step as all ranks together serve it, rows in lane order."""

    epoch: int
    step_in_epoch: int
    steps_per_epoch: int
    rows: list[Row]

    def joined(self, name: str) -> torch.Tensor:
        """A field of MaskedBatch over all rows."""
        import torch

        return torch.cat([getattr(row.masked, name) for row in self.rows])

    def digest(self) -> str:
        """64 hex digits, see the top of this file."""
        digest = hashlib.sha256()
        for name in ("input_ids", "positions", "targets"):
            digest.update(self.joined(name).numpy().astype("<i4").tobytes())
        return digest.hexdigest()


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """The options of this command, and the recipe that they and --config make.

    options.micro_batch_size is None where nobody gave a number.
    """
    parser = command_parser(__doc__, allow_abbrev=False)
    parser.add_argument("--step", type=int, required=True, help="global step, from 0")
    parser.add_argument("--world-size", type=int, default=1, help="ranks that share the batch (default 1)")
    parser.add_argument("--show", type=int, default=3, help="sequences to print (default 3)")
    for name, key in SHORT.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"short for --{key}", metavar="VALUE")
    options, rest = parser.parse_known_args(arguments)
    short = {key: getattr(options, name) for name, key in SHORT.items() if getattr(options, name) is not None}
    words = [*rest, *(f"--{key}={value}" for key, value in short.items())]
    for name, least in (("step", 0), ("world_size", 1), ("show", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')}={getattr(options, name)}: give at least {least}")
    config = parse_config(words, __doc__ or "")
    given = config.training.micro_batch_size
    options.micro_batch_size = given if isinstance(given, int) else None
    return options, config


def rebuild(config: Config, step: int, world_size: int, micro_batch_size: int | None = None) -> GlobalBatch:
    """Serve one step as every rank in turn.

    Args:
        micro_batch_size: None takes a rank's whole share at once.
    Raises:
        UserError, FileNotFoundError: as in training.
    """
    from train.build import load_manifest
    from train.data.masking import MaskedBatch
    from train.data.pipeline import build_run_data

    manifest = load_manifest(config.data.shards)
    share = check_fit(config.training.global_batch_size, config.data.lanes, world_size, 1)
    training = replace(config.training, micro_batch_size=micro_batch_size or share)
    # Sizes and sums are checked once, not by every rank.
    unchecked = replace(config.data, verify="size")
    rows = []
    for rank in range(world_size):
        recipe = replace(config, training=training, data=config.data if rank == 0 else unchecked)
        data = build_run_data(recipe, manifest, rank=rank, world_size=world_size)
        for batch in data.batches(step, step + 1):
            masked = data.mask(batch.input_ids, batch.window_ids, batch.epoch)
            for index, window_id in enumerate(batch.window_ids.tolist()):
                one = MaskedBatch(
                    *(getattr(masked, name)[index : index + 1] for name in masked.__dataclass_fields__)
                )
                rows.append(Row(rank, batch.micro_step, window_id, one))
    phase = data.phase_of(step)
    epoch, step_in_epoch = phase.loader.order.position(step - phase.first_step)
    return GlobalBatch(epoch, step_in_epoch, phase.loader.steps_per_epoch, rows)


def describe(batch: GlobalBatch, mask_id: int) -> str:
    """One line about the masks of the whole batch."""
    import torch

    valid, targets = batch.joined("valid"), batch.joined("targets")
    shown = torch.gather(batch.joined("input_ids"), 1, batch.joined("positions"))[valid]
    hidden = int((shown == mask_id).sum())
    kept = int((shown == targets[valid]).sum())
    total = max(1, len(shown))
    return (
        f"{len(batch.rows)} sequences of {batch.joined('input_ids').shape[1]} tokens, "
        f"{targets.shape[1]} masked in each: {hidden / total:.1%} hidden, "
        f"{(total - hidden - kept) / total:.1%} replaced, {kept / total:.1%} kept"
    )


def readable(masked: MaskedBatch, tokenizer: Any, mask_id: int) -> str:
    """A row as text; without a tokenizer, as token ids."""
    ids = masked.input_ids[0].tolist()
    hidden = {
        position: target
        for position, target, valid in zip(
            masked.positions[0].tolist(), masked.targets[0].tolist(), masked.valid[0].tolist(), strict=True
        )
        if valid
    }
    words: list[str] = []
    for position, token in enumerate(ids):
        target = hidden.get(position, token)
        glued, text = _piece(tokenizer, target)
        if position in hidden:
            instead = "->MASK" if token == mask_id else f"->{_piece(tokenizer, token)[1]}"
            text = f"[{text}{instead if token != target else ''}]"
        words.append(text if glued else f" {text}")
    return "".join(words).strip()


def _piece(tokenizer: Any, token: int) -> tuple[bool, str]:
    """Whether a token continues the word before it, and its text."""
    if tokenizer is None:
        return False, str(token)
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:  # a hole in the vocabulary
        return False, str(token)
    if piece.startswith("##") and len(piece) > 2:
        return True, _printable(piece[2:])
    marks_starts = getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None) != "##"
    text = tokenizer.convert_tokens_to_string([piece]).strip() or repr(piece)
    glued = marks_starts and not piece.startswith(("Ġ", "▁")) and token not in tokenizer.all_special_ids
    return glued, _printable(text)


def _printable(text: str) -> str:
    """A vocabulary may hold terminal control sequences."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def load_tokenizer(config: Config) -> Any:
    """The shards' tokenizer, or None where there is none to be had: then ids are shown."""
    from train.build import tokenizer_source
    from train.models.encoder_config import read_tokenizer

    try:
        return read_tokenizer(tokenizer_source(config))
    except UserError:
        return None


def main(arguments: Sequence[str]) -> int:
    """Rebuild, print, digest."""
    options, config = parse_arguments(arguments)
    from train.build import load_manifest

    mask_id = load_manifest(config.data.shards).tokenizer.mask_id
    batch = rebuild(config, options.step, options.world_size, options.micro_batch_size)
    print(
        f"step {options.step}: epoch {batch.epoch}, step {batch.step_in_epoch} of its {batch.steps_per_epoch}"
    )
    print(describe(batch, mask_id))
    if options.show:
        print(LEGEND)
        tokenizer = load_tokenizer(config)
    for number, row in enumerate(batch.rows[: options.show]):
        print(f"\nrow {number}: rank {row.rank}, micro step {row.micro_step}, window {row.window_id}")
        print(textwrap.fill(readable(row.masked, tokenizer, mask_id), width=100, break_long_words=False))
    print(f"\ndigest: {batch.digest()}")
    return 0


if __name__ == "__main__":
    run_main(main)
