"""One page about finished runs: held-out scores, loss curves, cost, and the DistilBERT paper's tables 1 to 4.

    python launch/report.py runs/student runs/control --out runs/report
    python launch/report.py runs/student --out runs/report --scores teacher=scores/teacher student=scores/student \\
        --inference inference.json --ablation runs/ablation/ablation.json

Out: DIR/report.html, self-contained, and the same as report.md; summary.json, loss.png, report.txt. The first run's
teacher is the reference of the held-out scores; --curves adds runs to the plot alone (the teacher's own, say).

  --scores     DIR/TASK/scores.json of launch/finetune.py: GLUE, IMDb, SQuAD, and what the student keeps of its teacher
  --inference  of launch/benchmark.py inference --json FILE: parameters, size on disk, latency
  --ablation   of launch/ablate.py
  --study      of launch/study.py: every objective on every student, in scores

Parts whose input is not given are left out, and the page names the command that makes them. Published figures stand
in columns of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.shard_format.required_packages import require_packages

require_packages()

from data_prep.shard_format.files import write_json, write_text
from launch.common.cli import command_parser, parse_config, run_main
from launch.reporting.inputs import (
    named_folders,
    read_ablation,
    read_inference,
    read_model_scores,
    read_study,
)
from train.errors import UserError
from train.run_folder import provenance

if TYPE_CHECKING:
    from launch.reporting.comparison import ComparedModel
    from launch.reporting.page import Report


def main(arguments: Sequence[str]) -> int:
    """Parse, read, compare, write, print."""
    options = parse(arguments)
    # After the command line: torch and transformers take seconds, which --help shall not.
    from launch.reporting.loss_curves import plot_losses
    from launch.reporting.page import as_html, as_markdown
    from launch.reporting.tables import heldout_text
    from train.distributed.world import quiet_libraries

    quiet_libraries()
    report = read(options)
    out = options.out
    if options.runs:
        report = dataclasses.replace(report, compared=compare_runs(options.runs))
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    if options.runs:
        lines = [heldout_text(report.compared)]
        if any(curve.losses for curve in report.curves):  # without an MLM head there is no MLM loss
            plot_losses(report.curves, out / "loss.png")
            lines.append(f"loss curves: {out / 'loss.png'}")
        write_json(out / "summary.json", summary_of(report))
        lines += [
            f"figures:     {out / 'summary.json'}",
            f"TensorBoard: tensorboard --logdir {os.path.commonpath([*options.curves, *options.runs])}",
        ]
    write_text(out / "report.html", as_html(report))
    write_text(out / "report.md", as_markdown(report))
    lines.append(f"page:        {out / 'report.html'}")
    write_text(out / "report.txt", "\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; ValueError where an option would have no effect."""
    parser = command_parser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folder of a finished run")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument(
        "--curves", nargs="*", type=Path, default=[], metavar="RUN", help="runs for the plot alone"
    )
    parser.add_argument("--scores", nargs="+", action="extend", default=[], metavar="NAME=DIR")
    parser.add_argument(
        "--reference",
        metavar="NAME",
        help="of --scores: what the others' retention is a share of (default: teacher, else the first)",
    )
    parser.add_argument("--inference", type=Path, metavar="FILE")
    parser.add_argument("--ablation", type=Path, metavar="FILE")
    parser.add_argument("--study", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if not any((options.runs, options.scores, options.inference, options.ablation, options.study)):
        raise UserError("nothing to report: give run folders, --scores, --inference, --ablation or --study")
    if options.curves and not options.runs:
        raise UserError("--curves adds to the plot of runs: give run folders too")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out}: is not a folder; give another name")
    if any((options.out / name).exists() for name in ("config.yaml", "metrics.jsonl")):
        raise UserError(
            f"--out {options.out}: is a run's folder, whose summary.json would be lost; give another folder"
        )
    if options.reference and not options.scores:
        raise UserError(f"--reference {options.reference} names a model of --scores: give --scores too")
    options.runs = [run.resolve() for run in options.runs]
    options.curves = [run.resolve() for run in options.curves]
    return options


def read(options: argparse.Namespace) -> Report:
    """All that was given but the models themselves; UserError where it does not fit together."""
    from launch.reporting.loss_curves import read_curve
    from launch.reporting.page import Report
    from launch.reporting.runs import read_run_facts
    from launch.reporting.scores import reference_of

    refuse_unclear_names([*options.runs, *options.curves])
    scores = named_folders(options.scores, "--scores")
    return Report(
        runs=[read_run_facts(run) for run in options.runs],
        curves=[read_curve(run) for run in [*options.curves, *options.runs]],
        scores=[read_model_scores(name, folder) for name, folder in scores.items()],
        reference=reference_of(list(scores), options.reference) if scores else "",
        inference=read_inference(options.inference) if options.inference else None,
        ablation=read_ablation(options.ablation) if options.ablation else None,
        study=read_study(options.study) if options.study else None,
        versions=provenance(),
    )


def refuse_unclear_names(runs: Sequence[Path]) -> None:
    """UserError where a run is missing, or two runs or curves would have the same name."""
    names = [run.name for run in runs]
    for run in runs:
        if not (run / "metrics.jsonl").exists():
            raise UserError(f"{run} is not a run folder: it holds no metrics.jsonl")
        if names.count(run.name) > 1:
            raise UserError(
                f"two runs are named {run.name!r}; rename a folder, since rows and curves go by that name"
            )


def compare_runs(runs: Sequence[Path]) -> list[ComparedModel]:
    """Score the models of finished runs and their teacher."""
    from launch.reporting.comparison import compare

    for run in runs:
        if not (run / "config.yaml").exists():
            raise UserError(f"{run} is not a run folder: it holds no config.yaml")
    return compare(runs, [parse_config(["--config", str(run / "config.yaml")], "") for run in runs])


def summary_of(report: Report) -> dict[str, Any]:
    """What summary.json holds."""
    from launch.reporting.comparison import as_json

    cost = [
        {**dataclasses.asdict(run), "tokens_per_s": run.tokens_per_s, "device_hours": run.process_hours}
        for run in report.runs
    ]
    return {"models": as_json(report.compared), "cost": cost, "versions": report.versions}


if __name__ == "__main__":
    run_main(main)
