"""What is each way of distilling one teacher worth, in scores? Students, objectives and budgets side by side.

    python launch/study.py --teacher encoder/ --corpus shards/ --tasks glue_data --out runs/study
    python launch/study.py --teacher NAME --corpus shards/ --tasks glue_data --out DIR --budget-tokens 4e6 \\
        --score-on sst2,mrpc --seeds 3 --finetune.learning-rate=1e-4 --training.global_batch_size=64

Students: half the teacher's depth at its width (half), and two thirds of both (narrow). Objectives, all for the same
number of tokens: the published triple loss (triple; a teacher without an MLM head first gets one by continued
pretraining on the corpus), relations alone (relations), the cosine of the hidden states alone (hidden), the published
loss and relations (both), MLM alone from random weights (control), relations from random weights (relations-random);
beside them the untrained cut, and relations for as much time as the triple loss takes. A curve follows triple and
relations over other budgets (--curve), each run with a schedule of its own. Each objective's learning rate is the one
of --rates with the lowest held-out loss, after a quarter of the budget on the first student. Where
objective.relation_heads does not divide the narrow width, that student has as many as divide both.

Every model is fine-tuned with launch/finetune.py on the tasks that --tasks holds (--finetune.KEY=VALUE becomes its
--KEY=VALUE for every task, --finetune.TASK.KEY=VALUE for one); --section.key=value and --config go to all runs of
launch/pretrain.py. Run the same command again after a kill: what is finished is skipped, what was interrupted goes on.
DIR/study.json alone is enough to go on with, on another machine too: what it records with the same settings is neither
trained nor scored again. Checkpoints and fine-tuned weights are removed once a run is scored (--keep leaves them). As
an array of jobs: `--only RUN` for teacher-head, where the teacher needs one; then for each search run, where there are
--rates; then for each other run (names by --list); then the command without it.

Out: DIR/study.json, study.md, study.png, and the tables on the screen, also where it is stopped; for one page:
launch/report.py --study DIR/study.json. Exit codes: 0 done; 1 a run failed, the others are in the tables; 2 bad usage,
configuration or input; 75 stopped, run again to continue.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.shard_format.required_packages import require_packages

require_packages()

from launch.common.cli import command_parser, parse_config, run_main
from launch.common.stages import AGAIN
from launch.experiments.job import StoppedError
from launch.experiments.options import (
    add_where,
    check_where,
    checked_finetuning,
    job_for,
    names_in,
    split_words,
)
from launch.experiments.study_runs import OBJECTIVES, Scale, Study, chosen, students_of
from train.data.corpus import without_heldout_windows
from train.distributed.signals import STOPPED_AFTER_SAVING
from train.errors import UserError
from train.run_folder import hold

if TYPE_CHECKING:
    from train.config import Config
    from train.models.build import TeacherFolder

TASKS = ("cola", "sst2", "mrpc", "stsb", "rte", "qnli", "mnli", "imdb", "squad")
OWN = {
    "model.teacher": "--teacher",
    "model.layer_map": "--layer-map and --objectives",
    "model.student_layers": "--students",
    "model.student_width": "--students",
    "data.shards": "--corpus",
    "training.max_steps": "--budget-tokens and --curve",
    "training.epochs": "--budget-tokens and --curve",
    "evaluation.every_steps": "--budget-tokens and --curve",
}
"""Keys that each run has of its own -> the options that say them."""
RELATION_WEIGHT = 1.0
"""Of the objectives that have relations, where the recipe gives none."""
CURVE = (1 / 8, 1 / 4, 1 / 2, 1, 2)
"""Of the budget."""


def main(arguments: Sequence[str]) -> int:
    """Parse, train what is not finished, score, compare."""
    options, words = _parse(arguments)
    for word in words:
        if (key := word.partition("=")[0].removeprefix("--")) in OWN:
            raise UserError(f"--{key} has no effect here: {OWN[key]} says it for each run; remove it")
    shared = [f"--data.shards={options.corpus}", f"--objective.relation_weight={RELATION_WEIGHT}"]
    shared += [f"--optimizer.lr={options.rates[0]}"] if options.rates else []
    words, own = split_words([*shared, *words], options.config)

    # After the command line: torch and transformers take seconds, which --help shall not.
    from launch.experiments.study import StudyJob, listed
    from launch.experiments.study_records import Records
    from train.build import load_manifest
    from train.distributed.world import quiet_libraries
    from train.finetuning.soft_labels import weights_digest
    from train.models.build import TeacherFolder
    from train.models.tokenizer_checks import check_vocabulary

    quiet_libraries()
    base = parse_config([*words, f"--model.teacher={options.teacher}"], "")
    folder = TeacherFolder(options.teacher, needs_head=False)
    study = _study(options, base, folder)
    flags = [f"--data={options.tasks}", f"--seeds={options.seeds}"]
    finetuning, settings = checked_finetuning(
        options.score_on or TASKS, flags, own, options.teacher, all_needed=options.score_on is not None
    )
    job = job_for(options, words, finetuning, options.seeds)
    for variant in study.listed():
        job.config_of(variant)
    if options.list:
        print(listed(study))
        return 0
    manifest = load_manifest(base.data.shards)
    check_vocabulary(folder.name, folder.config, folder.fingerprint, manifest.tokenizer)
    if (missing := without_heldout_windows(options.corpus, manifest, base.data.sequence_length)) is not None:
        raise UserError(f"nothing could be compared on held-out text: {missing}")
    # The jobs of an array share DIR; each run's folder has a lock of its own.
    with contextlib.nullcontext() if options.only else hold(options.out):
        try:
            names = {options.teacher: weights_digest(options.teacher)}
            records = Records.read(options.out, settings, options.seeds, names)
            made = StudyJob(job, study, records, options.only, options.keep)
            return made.run()
        except StoppedError:
            print("" if options.only else "\n" + made.write())
            print(f"\n{AGAIN}", file=sys.stderr)
            return STOPPED_AFTER_SAVING


def _study(options: argparse.Namespace, base: Config, folder: TeacherFolder) -> Study:
    """What is asked for, of this teacher."""
    from train.models.families import has_head  # see main
    from train.objective.build import relation_heads

    if base.objective.relation_heads is not None:
        relation_heads(base.objective.relation_heads, [folder.config.hidden_size])
    shape = (folder.config.num_hidden_layers, folder.config.hidden_size, folder.config.num_attention_heads)
    tokens_per_step = base.training.global_batch_size * base.data.sequence_length
    objectives = chosen(options.objectives, OBJECTIVES, "--objectives")
    return Study(
        teacher=options.teacher,
        has_head=has_head(folder.model),
        out=options.out,
        scale=Scale(options.budget_tokens, options.curve, tokens_per_step),
        students=chosen(options.students, students_of(*shape), "--students"),
        objectives=[each for each in objectives if each.is_on(base)],
        rates=options.rates or [base.optimizer.lr],
        recipe=base,
        layer_map=options.layer_map,
    )


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's options, and what is left for launch/pretrain.py and launch/finetune.py."""
    parser = command_parser(__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--teacher", required=True, metavar="DIR", help="encoder with its tokenizer: folder or hub name")
    add("--corpus", required=True, metavar="SHARDS", help="of data_prep/write_shards.py, with its tokenizer")
    add(
        "--tasks", required=True, metavar="DATA", help="folder of the tasks, as for launch/finetune.py --data"
    )
    add("--out", type=Path, default=Path("runs/study"), help="folder for everything (default: %(default)s)")
    add("--budget-tokens", default="4e6", metavar="N", help="of each run (default: %(default)s)")
    add(
        "--curve",
        metavar="N,N",
        help="other budgets; 0 for none (default: 1/8, 1/4, 1/2 and 2 of the budget)",
    )
    add("--students", metavar="A,B", help="of half, narrow (default: both)")
    layers_help = "the teacher's layers that students begin with (default: %(default)s)"
    add("--layer-map", choices=("every_other", "last_of_each"), default="every_other", help=layers_help)
    add("--objectives", metavar="A,B", help="these alone (default: all)")
    add("--rates", metavar="R,R", help="learning rates to try (default: that of the recipe alone)")
    add("--score-on", metavar="A,B", help=f"tasks (default: those of {','.join(TASKS)} that --tasks holds)")
    add("--seeds", type=int, default=3, metavar="N", help="fine-tuning seeds (default: %(default)s)")
    add("--config", action="append", default=[], metavar="R.yaml", help="recipe that all runs share")
    add("--only", metavar="RUN", help="train (and, of a student, score) this run alone, and make no tables")
    add("--keep", action="store_true", help="leave checkpoints and fine-tuned weights of what is scored")
    add("--list", action="store_true", help="say what would be trained, and stop")
    add_where(parser)
    options, words = parser.parse_known_args(arguments)
    check_where(options)
    if options.seeds < 1:
        raise UserError(f"--seeds {options.seeds}: give at least 1")
    options.score_on = None if options.score_on is None else names_in(options.score_on)
    for name in ("students", "objectives"):
        value = getattr(options, name)
        setattr(options, name, None if value is None else names_in(value))
    options.rates = list(dict.fromkeys(map(_rate, names_in(options.rates)))) if options.rates else []
    options.budget_tokens = _tokens(options.budget_tokens)
    budgets = [round(share * options.budget_tokens) for share in CURVE]
    options.curve = budgets if options.curve is None else _budgets(options.curve)
    return options, words


def _budgets(text: str) -> list[int]:
    return [] if text == "0" else [_tokens(word) for word in names_in(text)]


def _tokens(text: str) -> int:
    """A number of tokens such as 4e6; UserError for anything else."""
    try:
        found = int(float(text))
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise UserError(f"{text!r} is no number of tokens; give 4e6, for example")
    return found


def _rate(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < 1:
        raise UserError(f"--rates {text}: give learning rates between 0 and 1")
    return found


if __name__ == "__main__":
    run_main(main)
