"""Compare finished runs with their teacher on the same held-out windows: table, loss curves, summary.json.

    python launch/report.py runs/student runs/control --out runs/report

The first run's teacher is the reference. --curves adds runs to the plot alone (the teacher's own, say).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.cli import parse_config, run_main
from train.text_table import text_table


def main(arguments: Sequence[str]) -> int:
    """Parse, compare, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder of a finished run")
    parser.add_argument("--out", type=Path, required=True, help="folder for summary.json and loss.png")
    parser.add_argument(
        "--curves", nargs="*", type=Path, default=[], metavar="RUN", help="runs for the plot alone"
    )
    options = parser.parse_args(arguments)
    from train.comparison import as_json, compare, plot_losses, read_run_config
    from train.run_folder import provenance, write_json
    from train.world import quiet_libraries

    quiet_libraries()
    options.runs, options.curves = (
        [run.resolve() for run in runs] for runs in (options.runs, options.curves)
    )
    refuse_unclear_names([*options.runs, *options.curves])
    configs = [read_run_config(run, lambda words: parse_config(words, "")) for run in options.runs]
    compared = compare(options.runs, configs, say=lambda line: print(line, flush=True))
    options.out.mkdir(parents=True, exist_ok=True)
    plot_losses([*options.curves, *options.runs], options.out / "loss.png")
    write_json(options.out / "summary.json", {"models": as_json(compared), "versions": provenance()})
    lines = [
        table_of(as_json(compared)),
        f"loss curves: {options.out / 'loss.png'}",
        f"figures:     {options.out / 'summary.json'}",
        f"TensorBoard: tensorboard --logdir {os.path.commonpath([*options.curves, *options.runs])}",
    ]
    text = "\n".join(lines) + "\n"
    (options.out / "report.txt").write_text(text)
    print(text, end="")
    return 0


def refuse_unclear_names(runs: Sequence[Path]) -> None:
    """ValueError where a run is missing, or two rows or curves would have the same name."""
    names = [run.name for run in runs]
    for run in runs:
        if not (run / "metrics.jsonl").exists():
            raise ValueError(f"{run} is not a run folder: it holds no metrics.jsonl")
        if names.count(run.name) > 1:
            raise ValueError(
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
