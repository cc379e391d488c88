"""Train a student from a teacher, or a model from scratch, on tokenised shards.

    deepspeed launch/pretrain.py                                       the published DistilBERT-base recipe
    deepspeed launch/pretrain.py --config launch/recipes/quickstart-student.yaml
    deepspeed --hostfile hosts launch/pretrain.py --config R.yaml --training.max_steps=1000

Settings are filled in this order: the published recipe (the defaults shown below), --config files,
--section.key=value. Run again after a kill, and the run goes on from its newest complete checkpoint. The run
folder (run.dir) receives metrics.jsonl, tensorboard/, checkpoints/, the Hugging Face folder model/ (and a
link student to it, where there was a teacher) and summary.json.

Exit codes: 0 done; 2 bad usage, configuration or input; 75 stopped by a signal after saving, run again to
continue; 1 anything else.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.shard_format.required_packages import require_packages

require_packages()

from launch.common.cli import parse_config, run_main
from train.distributed.launcher_watch import launcher_chain
from train.distributed.signals import restart_on_sigusr1


def main(arguments: Sequence[str]) -> int:
    """Parse, wire, run."""
    launcher = launcher_chain()  # which may be killed during the imports
    config = parse_config(arguments, __doc__ or "")
    # Only now the seconds that torch and DeepSpeed take to import: --help and a mistyped flag answer at once. A tenth
    # of them would go into looking for garbage, of which imports make none; and a second at the end, among the million
    # objects that they leave.
    gc.disable()
    from train.run import run

    gc.freeze()
    gc.enable()
    return run(config, launcher)


if __name__ == "__main__":
    restart_on_sigusr1()
    run_main(main, one_job=True)
