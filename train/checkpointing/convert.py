"""DeepSpeed's conversion of a checkpoint to its universal form, which loads on any number of ranks.

    python -m train.checkpointing.convert CHECKPOINT OUT

A process of its own, since it prints a lot. No code of the checkpoint's is run (safe_load.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

from train.checkpointing.safe_load import weights_only
from train.distributed.world import import_deepspeed
from train.errors import BAD_USAGE, UserError


def main(checkpoint: str, out: str) -> None:
    """Convert; 2 as exit code, and the reason as the last line of stderr, where the checkpoint is refused."""
    import_deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    sys.argv = [
        "ds_to_universal",
        "--inject_missing_state",
        "--input_folder",
        checkpoint,
        "--output_folder",
        out,
    ]
    try:
        with weights_only(Path(checkpoint)):
            ds_to_universal.main(ds_to_universal.parse_arguments())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(BAD_USAGE)


if __name__ == "__main__":
    main(*sys.argv[1:])
