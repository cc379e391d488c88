"""One page about finished runs: held-out scores, loss curves, cost, and the DistilBERT paper's tables 1 to 4.

    python launch/report.py runs/student runs/control --out runs/report
    python launch/report.py runs/student --out runs/report --scores teacher=scores/teacher student=scores/student \\
        --inference inference.json --ablation runs/ablation/ablation.json

Out: DIR/report.html, self-contained, and the same as report.md; summary.json, loss.png, report.txt. The first run's
teacher is the reference of the held-out scores; --curves adds runs to the plot alone (the teacher's own, say).

  --scores     DIR/TASK/scores.json of launch/finetune.py: GLUE, IMDb, SQuAD, and what the student keeps of its teacher
  --inference  of launch/benchmark.py inference --json FILE: parameters, size on disk, latency
  --ablation   of launch/ablate.py

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
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.cli import parse_config, run_main
from launch.text_table import text_table
from train.errors import UserError

if TYPE_CHECKING:
    from launch.reporting.build import Given
    from launch.reporting.comparison import ComparedModel


def main(arguments: Sequence[str]) -> int:
    """Parse, read, compare, write, print."""
    options = parse(arguments)
    from data_prep.shard_format.files import write_text
    from launch.reporting.build import Given, build
    from launch.reporting.inputs import named_folders, read_ablation, read_inference, read_model_scores
    from launch.reporting.page import as_html, as_markdown
    from launch.reporting.runs import read_curve, read_run_facts
    from train.distributed.world import quiet_libraries
    from train.run_folder import provenance

    quiet_libraries()
    refuse_unclear_names([*options.runs, *options.curves])
    folders = named_folders(options.scores, "--scores")
    given = Given(
        runs=[read_run_facts(run) for run in options.runs],
        curves=[read_curve(run) for run in [*options.curves, *options.runs]],
        scores=[read_model_scores(name, folder) for name, folder in folders.items()],
        reference=options.reference,
        inference=read_inference(options.inference) if options.inference else None,
        ablation=read_ablation(options.ablation) if options.ablation else None,
        versions=provenance(),
    )
    report = build(given)  # refuses what does not fit together before anything is computed
    lines = []
    if options.runs:
        compared = compare_runs(options.runs)
        report = build(dataclasses.replace(given, compared=compared))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.runs:
        lines = write_comparison(options, compared, given)
    write_text(options.out / "report.html", as_html(report))
    write_text(options.out / "report.md", as_markdown(report))
    lines.append(f"page:        {options.out / 'report.html'}")
    text = "\n".join(lines) + "\n"
    (options.out / "report.txt").write_text(text)
    print(text, end="")
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; ValueError where an option would have no effect."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    options = parser.parse_args(arguments)
    if not (options.runs or options.scores or options.inference or options.ablation):
        raise UserError("nothing to report: give run folders, --scores, --inference or --ablation")
    if options.curves and not options.runs:
        raise UserError("--curves adds to the plot of runs: give run folders too")
    if options.reference and not options.scores:
        raise UserError(f"--reference {options.reference} names a model of --scores: give --scores too")
    options.runs, options.curves = (
        [run.resolve() for run in runs] for runs in (options.runs, options.curves)
    )
    return options


def compare_runs(runs: Sequence[Path]) -> list[ComparedModel]:
    """Score the models of finished runs and their teacher."""
    from launch.reporting.comparison import compare, read_run_config

    configs = [read_run_config(run, lambda words: parse_config(words, "")) for run in runs]
    return compare(runs, configs, say=lambda line: print(line, flush=True))


def write_comparison(
    options: argparse.Namespace, compared: Sequence[ComparedModel], given: Given
) -> list[str]:
    """Write loss.png and summary.json; the table and where things are, as lines."""
    from data_prep.shard_format.files import write_json
    from launch.reporting.comparison import as_json, plot_losses
    from train.run_folder import provenance

    plot_losses(given.curves, options.out / "loss.png")
    cost = [
        {**dataclasses.asdict(run), "tokens_per_s": run.tokens_per_s, "device_hours": run.process_hours}
        for run in given.runs
    ]
    summary = {"models": as_json(compared), "cost": cost, "versions": provenance()}
    write_json(options.out / "summary.json", summary)
    return [
        table_of(as_json(compared)),
        f"loss curves: {options.out / 'loss.png'}",
        f"figures:     {options.out / 'summary.json'}",
        f"TensorBoard: tensorboard --logdir {os.path.commonpath([*options.curves, *options.runs])}",
    ]


def refuse_unclear_names(runs: Sequence[Path]) -> None:
    """UserError where a run is missing, or two rows or curves would have the same name."""
    names = [run.name for run in runs]
    for run in runs:
        if not (run / "metrics.jsonl").exists():
            raise UserError(f"{run} is not a run folder: it holds no metrics.jsonl")
        if names.count(run.name) > 1:
            raise UserError(
                f"two runs are named {run.name!r}; rename a folder, since rows and curves go by that name"
            )


def table_of(models: list[dict[str, object]]) -> str:
    """The rows of summary.json as a plain table."""
    columns = {
        "parameters": ("parameters", ",d"),
        "mlm_loss": ("MLM loss (nats)", ".3f"),
        "perplexity": ("perplexity", ",.1f"),
        "accuracy": ("accuracy", ".1%"),
        "top1_agreement": ("top-1 agreement\nwith teacher", ".1%"),
        "sentences_per_s": ("sentences/s\n(CPU)", ",.0f"),
    }
    rows = [
        (str(model["name"]), *(format(model[key], style) for key, (_, style) in columns.items()))
        for model in models
    ]
    headings = ("model", *(heading for heading, _ in columns.values()))
    return text_table(headings, rows, title="Held-out masked tokens, the same for every model")


if __name__ == "__main__":
    run_main(main)
