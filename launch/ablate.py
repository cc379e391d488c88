"""What is each part of the recipe worth? Trains it again and again with one thing changed, and compares.

    python launch/ablate.py --config launch/recipes/quickstart-student.yaml --out runs/ablation
    python launch/ablate.py --config R.yaml --out DIR --variants no-kd,random --training.max_steps=1000
    python launch/ablate.py --config R.yaml --out DIR --hostfile hosts --tasks sst2,rte --data glue_data

This is table 4 of the DistilBERT paper (Sanh et al. 2019) for your recipe, corpus and teacher: without the soft targets
(no-kd), without the cosine of the hidden states (no-cosine), without masked-language modelling (no-mlm), from random
weights (random); and further, soft targets at masked positions alone (masked-kd) and students from other layers of the
teacher (every-other, distilbert, first-half, last-half), MiniLMv2's objective (relations), AdamW in place of LAMB
(adamw) and 30 % of the tokens masked (masking-30). --list says what each changes. Seed, data order, steps and learning
rate are the same for all, but for AdamW's rate (--adamw-lr). The recipe itself is trained with several seeds
(--full-seeds), since a difference that two seeds make as well is no finding.

Each variant is an ordinary run of launch/pretrain.py in DIR/VARIANT/; --section.key=value goes to all of them. Run the
same command again after a kill: what is finished is skipped, what was interrupted goes on. With --tasks every student
is fine-tuned with launch/finetune.py (--finetune.KEY=VALUE becomes its --KEY=VALUE,
--finetune.TASK.KEY=VALUE that of one task).

Out: DIR/ablation.json, ablation.md, ablation.png, and the table on the screen. Exit codes: 0 done; 1 a variant failed,
the others are in the table; 2 bad usage, configuration or input; 75 stopped, run again to continue.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_prep.shard_format.required_packages import require_packages

require_packages()

from launch.common.cli import command_parser, parse_config, run_main
from launch.common.stages import AGAIN
from launch.experiments.job import Finetuning, StoppedError
from launch.experiments.options import (
    FINETUNE,
    FINETUNING_SEEDS,
    add_where,
    check_where,
    checked_finetuning,
    job_for,
    names_in,
    split_words,
)
from launch.experiments.run_folders import refuse_other_runs
from train.data.corpus import without_heldout_windows
from train.distributed.signals import STOPPED_AFTER_SAVING
from train.errors import UserError
from train.run_folder import hold


def main(arguments: Sequence[str]) -> int:
    """Parse, train what is not finished, score, compare."""
    options, words = _parse(arguments)
    words, finetune_words = split_words(words, options.config)
    base = parse_config(words, "")

    # After the command line: torch and transformers take seconds, which --help shall not.
    from launch.ablation.job import AblationPlan, listed, run
    from launch.ablation.runs import refuse_teachers_without_head, teacher_layers
    from launch.ablation.variants import ADAMW_RATE, chosen_variants, variants_of
    from train.build import load_manifest
    from train.distributed.world import quiet_libraries
    from train.models.build import teacher_names

    quiet_libraries()
    variants, left_out = variants_of(
        base, teacher_layers(base), options.full_seeds, tuple(dict.fromkeys(options.adamw_lr or [ADAMW_RATE]))
    )
    if options.variants is not None:
        variants = chosen_variants(variants, left_out, names_in(options.variants))
        left_out = {}
    finetuning = _finetuning(options, finetune_words, teacher_names(base)[0])
    seeds = options.seeds or FINETUNING_SEEDS
    job, plan = job_for(options, words, finetuning, seeds), AblationPlan(base, variants, left_out)
    for variant in variants:
        job.config_of(variant)
    if options.list:
        print(listed(plan))
        return 0
    missing = without_heldout_windows(
        base.data.shards, load_manifest(base.data.shards), base.data.sequence_length
    )
    if missing is not None:
        raise UserError(f"every variant would be trained and none could be scored: {missing}")
    refuse_teachers_without_head(base)
    with hold(options.out):
        refuse_other_runs(options.out, variants, job.config_of)
        try:
            return run(job, plan)
        except StoppedError:
            print(f"\n{AGAIN}", file=sys.stderr)
            return STOPPED_AFTER_SAVING


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's options, and what is left for launch/pretrain.py and launch/finetune.py."""
    parser = command_parser(__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="R.yaml",
        help="the full recipe, as for launch/pretrain.py; default: the published one",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/ablation"), help="folder for everything (default: %(default)s)"
    )
    parser.add_argument("--variants", metavar="A,B", help="these alone, and the full recipe; default: all")
    parser.add_argument(
        "--full-seeds",
        type=int,
        default=2,
        metavar="N",
        help="seeds that the full recipe is trained with, to know how large chance is (default: %(default)s)",
    )
    parser.add_argument(
        "--adamw-lr",
        type=float,
        nargs="+",
        metavar="RATE",
        help="peak learning rates to try AdamW with, a run for each; LAMB's does not carry over (default: 1e-3)",
    )
    parser.add_argument("--list", action="store_true", help="say what would be trained, and stop")
    add_where(parser)
    parser.add_argument(
        "--tasks", metavar="A,B", help="fine-tune every student on these, for example sst2,rte"
    )
    parser.add_argument("--data", metavar="DIR", help="the tasks' data, as for launch/finetune.py")
    parser.add_argument(
        "--seeds", type=int, metavar="N", help=f"fine-tuning seeds (default: {FINETUNING_SEEDS})"
    )
    options, words = parser.parse_known_args(arguments)
    check_where(options)
    return options, words


def _finetuning(options: argparse.Namespace, own: Sequence[str], stand_in: str) -> dict[str, Finetuning]:
    """How every student is fine-tuned, by task; empty without --tasks."""
    if options.tasks is None:
        for name, given in (("--data", options.data), ("--seeds", options.seeds)):
            if given is not None:
                raise UserError(f"{name} has no effect without --tasks; name tasks, or remove it")
        if own:
            raise UserError(f"{FINETUNE}* has no effect without --tasks; name tasks, or remove it")
        return {}
    if options.seeds is not None and options.seeds < 1:
        raise UserError(f"--seeds {options.seeds}: give at least 1")
    flags = [f"--seeds={options.seeds or FINETUNING_SEEDS}"]
    flags += [] if options.data is None else [f"--data={options.data}"]
    return checked_finetuning(names_in(options.tasks), flags, own, stand_in)[0]


if __name__ == "__main__":
    run_main(main)
