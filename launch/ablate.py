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
is fine-tuned with launch/finetune.py (--finetune.KEY=VALUE becomes its --KEY=VALUE).

Out: DIR/ablation.json, ablation.md, ablation.png, and the table on the screen. Exit codes: 0 done; 1 a variant failed,
the others are in the table; 2 bad usage, configuration or input; 75 stopped, run again to continue.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_prep.shard_format.required_packages import require_packages

require_packages()

from launch import finetune
from launch.cli import parse_config, run_main
from launch.stages import AGAIN, RANKS, cpu_environment, deepspeed_words
from train.data.corpus import without_heldout_windows
from train.distributed.device import kind_here, unused_gpus
from train.distributed.signals import STOPPED_AFTER_SAVING
from train.errors import UserError
from train.run_folder import hold

FINETUNE = "--finetune."
FINETUNING_SEEDS = 5


def main(arguments: Sequence[str]) -> int:
    """Parse, train what is not finished, score, compare."""
    options, words = _parse(arguments)
    finetune_words = [f"--{word.removeprefix(FINETUNE)}" for word in words if word.startswith(FINETUNE)]
    words = [word for word in words if not word.startswith(FINETUNE)]
    words = [flag for recipe in options.config for flag in ("--config", recipe)] + words
    if any(word.startswith("--run.dir") for word in words):
        raise UserError("--run.dir has no effect here: every variant has its folder below --out; remove it")
    base = parse_config(words, "")

    # After the command line: torch and transformers take seconds, which --help shall not.
    from launch.ablation.job import Job, StoppedError, listed, run
    from launch.ablation.runs import refuse_other_runs, refuse_teachers_without_head, teacher_layers
    from launch.ablation.variants import ADAMW_RATE, chosen_variants, variants_of
    from train.build import load_manifest
    from train.distributed.world import quiet_libraries
    from train.models.build import teacher_names

    quiet_libraries()
    on_cpu = options.hostfile is None and kind_here() == "cpu"
    if on_cpu and (remark := unused_gpus(os.environ, "cpu")):
        print(f"warning: {remark}", file=sys.stderr, flush=True)
    variants, left_out = variants_of(
        base, teacher_layers(base), options.full_seeds, options.adamw_lr or (ADAMW_RATE,)
    )
    if options.variants is not None:
        variants = chosen_variants(variants, left_out, _names(options.variants))
        left_out = {}
    tasks, finetuning = _finetuning(options, finetune_words, teacher_names(base)[0])
    job = Job(
        out=options.out,
        words=words,
        base=base,
        variants=variants,
        left_out=left_out,
        launcher=_launcher(options, on_cpu),
        environment=cpu_environment() if on_cpu else dict(os.environ),
        finetuning=finetuning,
        tasks=tasks,
        finetuning_seeds=options.seeds or FINETUNING_SEEDS,
    )
    for variant in variants:
        job.config_of(variant)
    if options.list:
        print(listed(job))
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
            return run(job)
        except StoppedError:
            print(f"\n{AGAIN}", file=sys.stderr)
            return STOPPED_AFTER_SAVING


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's options, and what is left for launch/pretrain.py and launch/finetune.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
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
    where = parser.add_mutually_exclusive_group()
    ranks_help = f"ranks on this machine; default: one for each GPU, or {RANKS} on the CPU"
    where.add_argument("--ranks", type=int, metavar="N", help=ranks_help)
    where.add_argument("--hostfile", type=Path, help="train on these hosts, as with `deepspeed --hostfile`")
    parser.add_argument(
        "--tasks", metavar="A,B", help="fine-tune every student on these, for example sst2,rte"
    )
    parser.add_argument("--data", metavar="DIR", help="the tasks' data, as for launch/finetune.py")
    parser.add_argument(
        "--seeds", type=int, metavar="N", help=f"fine-tuning seeds (default: {FINETUNING_SEEDS})"
    )
    options, words = parser.parse_known_args(arguments)
    if options.ranks is not None and options.ranks < 1:
        raise UserError(f"--ranks {options.ranks}: give at least 1")
    if options.hostfile is not None and not options.hostfile.is_file():
        raise UserError(f"--hostfile {options.hostfile}: no such file")
    return options, words


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"{text!r} names nothing: give names with commas between them")
    return names


def _finetuning(
    options: argparse.Namespace, own_words: Sequence[str], stand_in: str
) -> tuple[list[str], list[str]]:
    """The tasks, and launch/finetune.py's flags for every student; both empty without --tasks.

    Args:
        stand_in: a model whose check stands for that of the students, which are not there yet: the teacher.
    Raises:
        UserError: what would otherwise only be found wrong after hours of training.
    """
    if options.tasks is None:
        for name, given in (("--data", options.data), ("--seeds", options.seeds)):
            if given is not None:
                raise UserError(f"{name} has no effect without --tasks; name tasks, or remove it")
        if own_words:
            raise UserError(f"{FINETUNE}* has no effect without --tasks; name tasks, or remove it")
        return [], []
    from launch.ablation.variants import FULL

    if options.seeds is not None and options.seeds < 1:
        raise UserError(f"--seeds {options.seeds}: give at least 1")
    flags = ["--task", *_names(options.tasks), "--seeds", str(options.seeds or FINETUNING_SEEDS)]
    flags += [] if options.data is None else ["--data", options.data]
    flags += own_words
    parser = finetune.parser()
    parser.error = _refuse_flag  # type: ignore[method-assign]
    parsed = parser.parse_args([*flags, "--model", stand_in, "--out", str(options.out / FULL / "scores")])
    jobs = [finetune.job_of(task, parsed) for task in finetune.tasks_of(parsed.task)]
    return [job.task.name for job in finetune.jobs_with_data(jobs, parsed.task)], flags


def _refuse_flag(message: str) -> NoReturn:
    raise UserError(f"{FINETUNE}KEY=VALUE, which becomes --KEY=VALUE of launch/finetune.py: {message}")


def _launcher(options: argparse.Namespace, on_cpu: bool) -> Callable[[], list[str]]:
    ranks = RANKS if options.ranks is None and on_cpu else options.ranks
    return lambda: deepspeed_words(ranks, options.hostfile)


if __name__ == "__main__":
    run_main(main)
