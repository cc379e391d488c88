"""Fine-tune an encoder on GLUE, IMDb, SQuAD or your own data and score it: what a student is worth.

    python launch/finetune.py --model runs/quickstart/student/model --task sst2 rte --data glue --out scores --seeds 3
    python launch/finetune.py --model runs/student/model --task csv:news.csv --label topic --out scores

The model is any folder with an encoder and its tokenizer (teacher or student, BERT, DistilBERT, RoBERTa, ...) or a name
on the hub. The data are local files in their usual layouts, or come from the hub (no --data). Each seed is another new
head and another order of the data; the table shows the median over the seeds, since small tasks move by points from
seed to seed. A killed or stopped run goes on with the same command.

Task distillation (DistilBERT (D) of the paper): --teacher FINETUNED_FOLDER adds its soft labels to the loss. With
several teachers, and --unlabelled texts, the student learns from what the ensemble says of texts that nobody has
labelled (Bucila et al. 2006).

A path may contain {task}, which becomes the task's name: --teacher runs/teacher-scores/{task}/seed-0
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.shard_format.required_packages import require_packages

require_packages()

from launch.common.cli import command_parser, run_main
from launch.common.tables import text_table
from train.distributed.signals import STOPPED_AFTER_SAVING, StopRequest, restart_on_sigusr1
from train.errors import NonFiniteError, UserError
from train.finetuning.data.own import LABEL_TYPES, OwnOptions, is_own, own_task
from train.finetuning.results import macro_average
from train.finetuning.settings import Job, settings_for
from train.finetuning.tasks import GLUE, TASKS, NoTrainingSetError, Settings, Task, task_named

COLUMNS = ("task", "metrics", "score,\nmedian", "lowest to\nhighest", "seeds", "train", "dev", "seconds")


def parser() -> argparse.ArgumentParser:
    """Options; a setting that is not given stays None, so that the task's own default holds."""
    made = command_parser(__doc__, allow_abbrev=False)
    made.add_argument(
        "--model", required=True, metavar="DIR", help="encoder with its tokenizer: folder or hub name"
    )
    made.add_argument(
        "--task",
        required=True,
        nargs="+",
        metavar="TASK",
        help=f"{', '.join(TASKS)}, or as papers spell them (SST-2); glue: all of GLUE that --data holds; your own: "
        "csv:FILE, tsv:FILE, jsonl:FILE, conll:FILE or hub:NAME[:CONFIG]",
    )
    made.add_argument(
        "--data", metavar="DIR", help="folder of the task, or of all tasks; hub:NAME[:CONFIG]; default: hub"
    )
    made.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="leaves DIR/TASK/seed-N/ and DIR/TASK/scores.json",
    )
    made.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="seeds 0 to N-1 (default 1; 5 for a table)"
    )
    made.add_argument(
        "--checkpoint-seconds",
        type=float,
        default=300.0,
        metavar="S",
        help="between checkpoints (default 300)",
    )
    _add_own(made)
    _add_distillation(made)
    _add_settings(made)
    return made


def _add_own(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("your own data (--task KIND:FILE is the training set)")
    group.add_argument(
        "--dev",
        metavar="FILE",
        help="dev set, of the same kind; without, a tenth of the training set, by a hash",
    )
    group.add_argument(
        "--text",
        nargs="+",
        default=(),
        metavar="COLUMN",
        help="column of the text, or two of a pair of texts (default: text; of tags: tokens)",
    )
    group.add_argument(
        "--label",
        nargs="+",
        default=(),
        metavar="COLUMN",
        help="column of the label (default: label; of tags: tags, and in CoNLL files the last); of --label-type "
        "classes also a column of 0 and 1 for each class",
    )
    group.add_argument(
        "--label-type",
        choices=LABEL_TYPES,
        help="class (default): one name for a text; classes: any number of them, as a JSON list or a|b; number: a "
        "regression; tags: a class for each word",
    )
    group.add_argument(
        "--columns",
        nargs="+",
        default=(),
        metavar="NAME",
        help="of a file whose first row does not name them",
    )
    group.add_argument(
        "--metrics",
        nargs="+",
        default=(),
        metavar="NAME",
        help="accuracy, macro_f1, micro_f1, matthews, f1; pearson, spearman; entity_f1 (default: by --label-type); the "
        "score is their mean",
    )


def _add_distillation(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("task distillation")
    group.add_argument(
        "--teacher",
        nargs="+",
        default=[],
        metavar="DIR",
        help="models fine-tuned on the task; several: an ensemble",
    )
    group.add_argument(
        "--unlabelled", metavar="FILE", help=".txt, .tsv or .jsonl of texts for the teachers to label"
    )
    group.add_argument(
        "--unlabelled-only", action="store_true", default=None, help="leave the labelled training set out"
    )
    group.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="of the soft labels (default 2); STS-B, a regression, has none",
    )
    group.add_argument(
        "--hard-weight", type=float, metavar="A", help="share of the loss on true labels (default 0.5)"
    )


def _add_settings(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("settings (default: the task's, as published; see docs/FINETUNING.md)")
    group.add_argument("--epochs", type=float)
    group.add_argument("--learning-rate", type=float)
    group.add_argument("--batch-size", type=int)
    group.add_argument("--max-length", type=int, metavar="TOKENS", help="longer texts are cut")
    group.add_argument("--warmup-ratio", type=float, help="share of the steps (default 0.1)")
    group.add_argument("--weight-decay", type=float, help="default 0.01")
    group.add_argument(
        "--group-by-length",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="batches of texts of like length, for less padding (default)",
    )
    group.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="matrix products in bfloat16: faster on GPUs, and on processors with AMX or AVX512-BF16",
    )
    group.add_argument(
        "--max-train-examples", type=int, metavar="N", help="a fixed random part of the training set"
    )
    group.add_argument(
        "--max-eval-examples", type=int, metavar="N", help="a fixed random part of each dev set"
    )
    group.add_argument(
        "--doc-stride", type=int, metavar="TOKENS", help="SQuAD: from window to window (default 128)"
    )
    group.add_argument(
        "--max-answer-length", type=int, metavar="TOKENS", help="SQuAD: longest answer (default 30)"
    )


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0, or 75 when stopped by a signal after a checkpoint."""
    options = parser().parse_args(arguments)
    tasks = tasks_of(options.task, own_options(options))
    jobs = [job_of(task, options) for task in tasks]
    if options.seeds < 1:
        raise UserError(f"--seeds is {options.seeds}; give at least 1")
    one_gpu(os.environ)
    return run_jobs(jobs_with_data(jobs, options.task), range(options.seeds))


def own_options(options: argparse.Namespace) -> OwnOptions:
    """What is said of a task of one's own; UserError where --task names none, or several."""
    own = [name for name in options.task if is_own(name)]
    given = [field.name for field in fields(OwnOptions) if getattr(options, field.name)]
    if given and len(own) != 1:
        flag = f"--{given[0].replace('_', '-')}"
        those = f"and there are {len(own)}; run one at a time" if own else "as csv:FILE; leave it out"
        raise UserError(f"{flag} is about one --task of your own, {those}")
    if options.data and len(own) == len(options.task):
        raise UserError(f"--data has no effect on {own[0]}, which names its own data; leave it out")
    return OwnOptions(
        options.dev,
        tuple(options.columns),
        tuple(options.text),
        tuple(options.label),
        options.label_type,
        tuple(options.metrics),
    )


def tasks_of(names: Sequence[str], own: OwnOptions | None = None) -> list[Task]:
    """The tasks in the order given, each once.

    Raises:
        UserError: an unknown one, or two of a name.
    """
    found: dict[str, Task] = {}
    spelled = [name for given in names for name in (GLUE if given.lower() == "glue" else (given,))]
    for name in spelled:
        task = own_task(name, own or OwnOptions()) if is_own(name) else task_named(name)
        if found.setdefault(task.name, task) != task:
            raise UserError(
                f"--task {name}: there is one named {task.name} already, and their scores would lie in one folder; run "
                "one at a time, each with an --out of its own"
            )
    return list(found.values())


def job_of(task: Task, options: argparse.Namespace) -> Job:
    """What one task is to do; UserError for settings that cannot be."""

    def for_task(path: str) -> str:
        return path.replace("{task}", task.name)

    if options.unlabelled and not options.teacher:
        raise UserError("--unlabelled has no effect without --teacher, who would label it; give both")
    if options.unlabelled_only and not options.unlabelled:
        raise UserError("--unlabelled-only needs --unlabelled FILE")
    if options.teacher and options.hard_weight == 1.0 and not options.unlabelled:
        raise UserError(
            "--hard-weight 1 leaves the soft labels out, so that --teacher has no effect; give less, or no --teacher"
        )
    if not options.checkpoint_seconds >= 0:
        raise UserError(f"--checkpoint-seconds is {options.checkpoint_seconds}; give 0 or more")
    given = {field.name: getattr(options, field.name) for field in fields(Settings)}
    teachers = tuple(map(for_task, options.teacher))
    data = for_task(options.data) if options.data and options.data != "hub" else None
    return Job(
        task=task,
        model=for_task(options.model),
        data=task.own.train if task.own is not None else data,
        settings=settings_for(task, given, teachers),
        folder=options.out / task.name,
        teachers=teachers,
        unlabelled=for_task(options.unlabelled) if options.unlabelled else None,
        checkpoint_seconds=options.checkpoint_seconds,
    )


def one_gpu(environment: MutableMapping[str, str]) -> None:
    """Of several GPUs transformers' Trainer would use all and multiply the batch size by their number."""
    first = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment["CUDA_VISIBLE_DEVICES"] = first


def jobs_with_data(jobs: Sequence[Job], names: Sequence[str]) -> list[Job]:
    """Check all before the first begins; of `glue`, leave out aloud what --data lacks.

    Args:
        names: --task as given.
    Raises:
        UserError: data or models do not fit, or a task that is named itself has no data.
    """
    from train.distributed.world import quiet_libraries, set_deepspeed_log_level
    from train.finetuning.runs import check_task

    quiet_libraries()
    set_deepspeed_log_level("error")  # accelerate imports it
    named = {task_named(name).name for name in names if name.lower() != "glue" and not is_own(name)}
    kept = []
    for job in jobs:
        try:
            check_task(job)
        except NoTrainingSetError as error:
            if job.task.name in named or job.task.own is not None:
                raise
            print(f"{job.task.name} is left out: {error}", flush=True)
        else:
            kept.append(job)
    if not kept:
        raise UserError(
            f"{jobs[0].data} holds none of the tasks {', '.join(job.task.name for job in jobs)}; give --data the "
            "folder of glue_data"
        )
    return kept


def run_jobs(jobs: Sequence[Job], seeds: Sequence[int]) -> int:
    """Run one after another, then print the table."""
    from train.finetuning.runs import run_task
    from train.finetuning.training import Stopped

    results, failed = [], {}
    with StopRequest() as stop:
        try:
            for job in jobs:
                try:
                    results.append(run_task(replace(job, stop=stop), seeds))
                except NonFiniteError as error:  # the other tasks may be without it
                    failed[job.task.name] = f"{job.task.name} FAILED: {error}"
                    print(failed[job.task.name], file=sys.stderr, flush=True)
        except Stopped as stopped:
            print(f"{stopped}; run the same command again to go on", file=sys.stderr)
            return STOPPED_AFTER_SAVING
    if results:
        print(table_of(results))
    done = [str(job.folder / "scores.json") for job in jobs if job.task.name not in failed]
    print(f"scores: {', '.join(done)}" if done else "no scores")
    for message in failed.values():
        print(message, file=sys.stderr)
    return 1 if failed else 0


def table_of(results: Sequence[Mapping[str, Any]]) -> str:
    """The final table, with GLUE's macro average where there is more than one of its tasks."""
    rows: list[tuple[str, ...]] = []
    for result in results:
        median, seeds = result["median"], result["seeds"].values()
        found = [seed["score"] for seed in seeds]
        rows.append(
            (
                result["task"],
                " / ".join(result["metrics"]),
                f"{median['score']:.1f}",
                f"{min(found):.1f} to {max(found):.1f}",
                str(len(seeds)),
                f"{result['train_examples']:,}",
                " + ".join(f"{count:,}" for count in result["dev_examples"].values()),
                f"{sum(seed['seconds'] for seed in seeds):,.0f}",
            )
        )
    scores = {result["task"]: result["median"]["score"] for result in results}
    num_glue = sum(name in GLUE for name in scores)
    if num_glue > 1:
        rows.append(
            (f"GLUE ({num_glue} of {len(GLUE)})", "macro average", f"{macro_average(scores):.1f}", *[""] * 5)
        )
    text = text_table(COLUMNS, rows, title="Dev scores in points of 0 to 100")
    absent = [name for name in GLUE if name not in scores]
    return f"{text}\nGLUE's average is without {', '.join(absent)}" if num_glue > 1 and absent else text


if __name__ == "__main__":
    restart_on_sigusr1()
    run_main(main)
