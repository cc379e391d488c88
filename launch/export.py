"""Write a checkpoint's student as an ordinary Hugging Face folder. Needs no GPU, no teacher and no shards.

    python launch/export.py RUN OUT                       the newest complete checkpoint of a run
    python launch/export.py RUN/checkpoints/step-00000500 OUT

The folder holds safetensors weights (the optimizer's fp32 copy), the tokenizer and a model card; it is loaded
back with stock transformers and must give the same logits before it appears under its name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.cli import run_main


def main(arguments: Sequence[str]) -> int:
    """Parse, export, say what was done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make; must not exist")
    options = parser.parse_args(arguments)
    if options.out.exists():
        raise ValueError(f"{options.out} exists; give another folder or remove it first")
    from train.export import export_checkpoint, find_checkpoint
    from train.run_folder import read_summary

    checkpoint = find_checkpoint(options.source)
    difference = export_checkpoint(checkpoint, options.out, read_summary(checkpoint.parent.parent))
    print(f"{checkpoint} -> {options.out} (logits of both differ by {difference:g})")
    return 0


if __name__ == "__main__":
    run_main(main)
