"""DeepSpeed's conversion of a checkpoint to its universal form, which loads on any number of ranks.

    python -m train.checkpointing.convert CHECKPOINT OUT

A process of its own, since it prints a lot; it ends with the rank that started it. No code of the checkpoint's is run
(safe_load.py).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from train.distributed.signals import end_with_parent
from train.errors import BAD_USAGE, UserError


def main(checkpoint: str, out: str) -> None:
    """Convert; 2 as exit code, and the reason as the last line of stderr, where the checkpoint is refused."""
    end_with_parent(signal.SIGKILL)
    os.register_at_fork(after_in_child=lambda: end_with_parent(signal.SIGKILL))  # DeepSpeed's workers
    # Only now torch, whose import takes seconds.
    from train.checkpointing.safe_load import weights_only
    from train.distributed.world import import_deepspeed

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
