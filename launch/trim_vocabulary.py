"""Make a teacher smaller by the part of its vocabulary that a corpus does not use: one language out of many, say.

    python launch/trim_vocabulary.py TEACHER --shards shards --out trimmed

TEACHER is a Hugging Face folder of an encoder, with an MLM head or without, and a WordPiece, BPE or Unigram tokenizer
with which the shards were written. The folder that is made is a teacher like any other. Texts whose tokens are all kept
get the same tokens under new ids, and the same hidden states to the bit; others are spelled with kept tokens. Then the
shards are written again with its tokenizer.

Kept are special and added tokens, the characters of the corpus, and its most frequent tokens: --keep N in all, or as
many as reach a --coverage of its tokens (train split).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.shard_format.required_packages import require_packages

require_packages()

from launch.common.cli import command_parser, run_main
from train.errors import UserError

COVERAGE = 0.9999


def main(arguments: Sequence[str]) -> int:
    """Parse, trim, say what is left."""
    parser = command_parser(__doc__)
    parser.add_argument("teacher", type=Path, metavar="TEACHER", help="Hugging Face folder")
    parser.add_argument("--shards", required=True, metavar="DIR", help="folder or URL of shards")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--keep", type=int, metavar="N", help="tokens to keep, at most")
    size.add_argument(
        "--coverage",
        type=float,
        default=COVERAGE,
        metavar="SHARE",
        help="share of the corpus' tokens that stay as they are (default: %(default)s; 1 keeps all that it uses)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to make; must not exist"
    )
    options = parser.parse_args(arguments)
    if options.keep is not None and options.keep < 1:
        raise UserError(f"--keep {options.keep}: give the number of tokens to keep")
    if not 0 < options.coverage <= 1:
        raise UserError(
            f"--coverage {options.coverage}: give a share above 0 and at most 1, such as {COVERAGE}"
        )
    if options.out.exists():
        raise UserError(f"{options.out} exists; give another folder or remove it first")
    from train.distributed.world import import_deepspeed, quiet_libraries
    from train.export.trimming import trim_teacher

    quiet_libraries()
    import_deepspeed()  # here, with its remarks held back: save_pretrained imports it
    result = trim_teacher(
        options.teacher, options.shards, options.out, keep=options.keep, coverage=options.coverage
    )
    (tokens, kept), (whole, left), sample = result.tokens, result.parameters, result.sample
    print(
        f"{kept:,} of {tokens:,} tokens are kept: {result.coverage:.4%} of the train split's\n"
        f"{left:,} of {whole:,} parameters are left, {1 - left / whole:.1%} less\n"
        f"of {sample.tokens[0]:,} held-out tokens {sample.dropped:,} are spelled with others, which makes "
        f"{sample.tokens[1]:,}; unknown {sample.unknown[0]:,}, now {sample.unknown[1]:,}\n"
        f"{options.out}; next: python data_prep/write_shards.py SOURCE... --tokenizer {options.out} --out SHARDS"
    )
    return 0


if __name__ == "__main__":
    run_main(main)
