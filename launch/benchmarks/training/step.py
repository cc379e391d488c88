"""A whole training step: data, masks, teacher, student, reduction, LAMB and log, under the DeepSpeed engine.

    python launch/benchmark.py step --ranks 1,2 --shapes 8x128,4x512 --against plain

Ranks of this machine are started by the real launcher and make steps of launch/pretrain.py's own trainer, with its
shipped engine JSON (ZeRO-2; fp32 on a CPU, fp16 on a GPU), on random weights and random shards made here. With
`--against plain` the original code's formulation (logits of both models at all positions, triple loss, torch's dropout)
takes turns with it, on the same trainer, engine and LAMB; with `--against compiled` the same step with teacher and
student through torch.compile. The ratio is the time of the other over that of ours. The log is written at every step,
not at every tenth.

Shares of the step are each part's own time: "forward" holds the loss and the teacher's logits, "backward" leaves out
"collectives", "optimizer" is the engine's part beside "lamb", "data" the wait for it beside "masking". The floor is the
time of the step's matrix products, each at the best rate that was measured for its shape between the rounds, on all
ranks at once, plus the bytes of LAMB, and of what crosses between ranks, at the best measured bandwidth of memory. On a
GPU collectives are not told apart, and NONE OF THIS HAS BEEN RUN ON ONE.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_prep.shard_format.files import write_json
from launch.benchmarks import options
from launch.benchmarks.run_inputs import OBJECTIVES
from launch.benchmarks.training import settings
from launch.benchmarks.training.launching import measured
from launch.common.machine import hardware
from launch.common.tables import text_table
from train.distributed.world import quiet_libraries
from train.errors import UserError
from train.run_folder import provenance

AGAINST = "what takes turns with it: the original formulation, or ours through torch.compile"
PARTS = (
    "data",
    "masking",
    "teacher",
    "forward",
    "backward",
    "student",
    "collectives",
    "lamb",
    "optimizer",
    "metrics",
    "rest",
)
COLUMNS = (
    "model",
    "ranks",
    "shape",
    "objective",
    "tokens/s",
    "step s",
    "best s",
    "floor s",
    "share",
    "ratio",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument(
        "--shapes", type=options.shapes, default="8x128", help="batch x sequence of a rank, with commas"
    )
    parser.add_argument(
        "--objective",
        type=options.one_or_more_of((*OBJECTIVES, settings.MLM)),
        help=f"some of {', '.join(OBJECTIVES)}, with commas (default triple; {settings.MLM} for quickstart-teacher)",
    )
    parser.add_argument("--against", choices=["plain", "compiled"], help=AGAINST)
    parser.add_argument(
        "--accumulation", type=options.at_least_1, default=1, help="micro batches of a step (default 1)"
    )
    parser.add_argument("--rounds", type=options.at_least_1, default=4, help="turns of each (default 4)")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the processor time of one rank of one thread: for a machine that does other work too",
    )
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="trace some steps too: DIR/RANKS-SHAPE-OBJECTIVE/"
    )


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Of every benchmark that starts ranks."""
    parser.add_argument(
        "--model",
        type=settings.size,
        default="bert-base",
        help=f"{', '.join(settings.SIZES)}, or layers x width such as 6x384: a BERT and its student of half the "
        "layers; of quickstart-teacher the model itself (default bert-base)",
    )
    parser.add_argument("--ranks", type=_ranks, default="1", help="of this machine, with commas (default 1)")
    parser.add_argument("--json", type=options.new_file, metavar="FILE", help="also write the figures here")


def _ranks(text: str) -> list[int]:
    return [options.at_least_1(word) for word in text.split(",")]


def main(args: argparse.Namespace) -> int:
    possible = settings.objectives_of(args.model)
    objectives = args.objective or possible[:1]
    if unknown := [name for name in objectives if name not in possible]:
        raise UserError(f"--objective={unknown[0]}: with --model={args.model} give {' or '.join(possible)}")
    if args.against == "plain" and settings.MLM in objectives:
        raise UserError(f"--against=plain: --model={args.model} has no teacher; leave it out")
    if args.processor_time and args.ranks != [1]:
        raise UserError("--processor-time leaves out what a rank waits for others; give --ranks=1")
    quiet_libraries()
    rows = []
    for ranks in args.ranks:
        for shape in args.shapes:
            for objective in objectives:
                figures = _measured(args, ranks, shape, objective)
                rows.append(
                    {"model": args.model, "ranks": ranks, "shape": str(shape), "objective": objective}
                    | figures
                )
                print(f"measured: {ranks} ranks, {shape}, {objective}", flush=True)
    print(as_text(rows))
    if args.json:
        write_json(
            args.json,
            {
                "machine": hardware(),
                **provenance(),
                "accumulation": args.accumulation,
                "processor_time": args.processor_time,
                "steps": rows,
            },
        )
    return 0


def _measured(args: argparse.Namespace, ranks: int, shape: options.Shape, objective: str) -> dict[str, Any]:
    def spec(folder: Path) -> dict[str, Any]:
        runs = {"ours": objective}
        if args.against:
            runs[args.against] = objective if args.against == "compiled" else "triple"
        profile = args.profile and args.profile.absolute() / f"{ranks}-{shape}-{objective}"
        return {
            "kind": "step",
            "shape": list(shape),
            "rounds": args.rounds,
            "processor_time": args.processor_time,
            "profile": str(profile) if profile else None,
            "contenders": {
                name: [
                    *settings.settings(args.model, each, shape, ranks, args.accumulation, folder),
                    *(settings.compiled(each) if name == "compiled" else []),
                ]
                for name, each in runs.items()
            },
        }

    return measured(spec, ranks)


def as_text(rows: list[dict[str, Any]]) -> str:
    """Two tables: speed, and where the time goes."""
    speeds, shares = [], []
    for row in rows:
        names = [str(row[name]) for name in COLUMNS[:4]]
        for name, run in row["runs"].items():
            floor, ours = sum(row["floor_s"].values()), name == "ours"
            speeds.append(
                [
                    *names[:3],
                    names[3] if ours else name,
                    f"{run['tokens_per_s']:,.0f}",
                    f"{run['step_s']:.3f}",
                    f"{run['best_s']:.3f}",
                    f"{floor:.3f}" if ours else "",
                    f"{floor / run['step_s']:.0%}" if ours else "",
                    f"{row['ratio']:.2f}" if ours and row["ratio"] else "",
                ]
            )
            percent = [f"{run['shares'].get(part, 0.0):.1%}" for part in PARTS]
            shares.append([" ".join(names[1:3]), names[3] if ours else name, *percent])
    rates = [row["gflop"] / row["floor_s"]["products"] for row in rows]
    remark = (
        f"matrix products: {min(rates):.0f} to {max(rates):.0f} GFLOP/s a rank; threads of a rank: "
        + ", ".join(sorted({str(row["threads"]) for row in rows}))
    )
    return "\n\n".join(
        [
            text_table(COLUMNS, speeds, title="training steps"),
            text_table(("run", "objective", *PARTS), shares),
            remark,
        ]
    )
