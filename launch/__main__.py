"""The command `deepspeed`, started so that Ctrl-C ends it in order.

    python -m launch launch/pretrain.py --config R.yaml
    python -m launch --num_gpus 2 launch/pretrain.py --config R.yaml

All flags are those of `deepspeed`. At Ctrl-C the ranks save and say so, and the exit code is 75; `deepspeed` itself
ends at once with a traceback, and kills ranks that save for more than 30 s. Its own remarks are left out unless
--log_level asks for them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.shard_format.required_packages import require_packages

require_packages()

from launch.cli import run_main
from launch.stages import AGAIN, LAUNCHER, QUIET, run_until_stopped
from train.distributed.signals import STOPPED_AFTER_SAVING


def main(arguments: Sequence[str]) -> int:
    """The ranks' exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
    is_talkative = any(word.startswith(("--log_level", "-q", "--quiet")) for word in arguments)
    command = [*LAUNCHER, *([] if is_talkative else QUIET), *arguments]
    code, was_stopped = run_until_stopped(command, os.environ)
    if was_stopped and code not in (0, STOPPED_AFTER_SAVING):
        print(AGAIN, file=sys.stderr)
        return STOPPED_AFTER_SAVING
    return code


if __name__ == "__main__":
    run_main(main)
