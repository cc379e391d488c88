"""Plan a run before it is paid for: memory of a GPU, FLOPs, bytes sent, tokens/s, days, GPU-hours, money.

    python launch/plan.py --nodes 1 --gpus-per-node 8 --gpu V100-32GB --price 2.50
    python launch/plan.py --nodes 8 --gpu H100 --config R.yaml --training.micro_batch_size=64 --plot plan.png

Takes the same --config and --section.key=value as launch/pretrain.py; see its --help. Pure arithmetic: nothing is
downloaded, loaded or started. What the predictions were checked against is in docs/PLANNING.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.shard_format.required_packages import require_packages

require_packages()

from data_prep.shard_format.files import write_json
from data_prep.shard_format.manifest import MANIFEST_NAME
from launch.common.cli import command_parser, parse_config, run_main
from launch.planner.hardware import LINK_EFFICIENCY, find_gpu
from train.config import Config
from train.config_sections.data import DataConfig
from train.config_sections.training import DEFAULT_MICRO_BATCH_SIZE
from train.data.order import TooFewWindowsError
from train.engine_config import (
    EngineSettings,
    default_engine_config,
    engine_settings,
    read_engine_config,
    resolve_engine_config,
)
from train.errors import UserError

if TYPE_CHECKING:
    from launch.planner.cost import Machines

SMALLEST, LARGEST = 1e-9, 1e15
"""Of any number that is given: beyond them products overflow."""
PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def main(arguments: Sequence[str]) -> int:
    """Parse, plan, print."""
    options, rest = build_parser().parse_known_args(arguments)
    refuse_impossible(options)
    rest += [f"--data.shards={shards}" for shards in options.shards]
    config = parse_config(rest, "")
    if config.training.max_steps == 0:
        raise UserError(
            "training.max_steps=0: nothing is trained, and there is nothing to plan; give 1 or more"
        )
    # Only now the seconds that transformers takes to import.
    from launch.planner import tables
    from launch.planner.planning import as_json, fitting_micro_batch, make_plan, scaling_curve
    from launch.planner.workload import read_recipe
    from train.data.pipeline import fit_micro_batch

    machines, memory_gib, notes = machines_of(options)
    engine = engine_of(config)
    check_precision(options, engine.precision)
    tokens, vocabulary, corpus = corpus_of(options, config)
    asked = config.training.micro_batch_size
    if asked is None:
        config = fit_micro_batch(config, machines.world_size)
    micro = 1 if asked == "auto" else config.training.settled_micro_batch_size
    try:
        recipe = read_recipe(config, engine, tokens, vocabulary, micro_batch_size=micro)
    except TooFewWindowsError as error:
        raise UserError(f"{corpus}\n{error}\nor plan for another corpus: --tokens 3e9") from None
    make_plan(recipe, machines)  # refuses a number of GPUs that does not fit, before anything is printed
    largest = fitting_micro_batch(recipe, machines.world_size, memory_gib)
    if asked == "auto" and largest:
        recipe = replace(recipe, micro_batch_size=largest)
    plan = make_plan(recipe, machines)
    largest_on_curve = DEFAULT_MICRO_BATCH_SIZE if asked is None else recipe.micro_batch_size
    curve = scaling_curve(replace(recipe, micro_batch_size=largest_on_curve), machines)
    print("\n".join([*notes, corpus, ""]))
    parts = [
        tables.memory_table(plan, memory_gib),
        tables.work_table(plan),
        tables.time_table(plan, options.price),
    ]
    print("\n\n".join([*parts, tables.curve_table(curve, options.price), tables.comparison_table(plan)]))
    if plan.memory_gib > memory_gib:
        remedy = (
            f"--training.micro_batch_size={largest} fits" if largest else "not even a micro batch of 1 fits"
        )
        print(f"\nDOES NOT FIT: {plan.memory_gib:.1f} GiB are needed and a GPU has {memory_gib:g}; {remedy}")
    if options.plot:
        title = f"{options.gpu}, {options.gpus_per_node} a node, MFU {machines.mfu:.0%}"
        tables.plot_curve(curve, options.plot, title)
        print(f"\nscaling curve: {options.plot}")
    if options.json:
        write_json(options.json, as_json(plan, curve, options.price))
        print(f"figures: {options.json}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags that are the plan's own."""
    parser = command_parser(__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="machines (1)")
    add("--gpus-per-node", type=int, default=8, help="GPUs in each (8)")
    add(
        "--gpu",
        default="A100-80GB",
        help="kind of GPU, of the table in launch/planner/hardware.py (A100-80GB)",
    )
    add(
        "--matrix-rate",
        type=float,
        help="dense TFLOP/s of a GPU in the run's precision; the table's by default",
    )
    add("--memory-gib", type=float, help="memory of a GPU; the table's by default")
    add(
        "--intra-node-gb-per-s",
        type=float,
        help="all-reduce rate of a GPU inside a node; 75 %% of its link's",
    )
    add("--inter-node-gb-per-s", type=float, help="rate of a node's network ports together (75 %% of 25)")
    add(
        "--mfu",
        type=float,
        help="share of the matrix rate that models reach (0.30; its reason: launch/planner/cost.py)",
    )
    add("--tokens", type=float, help="tokens in the corpus, in place of shards")
    add(
        "--shards",
        "--data.shards",
        action="append",
        default=[],
        help="a folder whose manifest says how large the corpus is",
    )
    add("--price", type=float, help="money per GPU-hour")
    add(
        "--plot",
        type=Path,
        nargs="?",
        const=Path("plan.png"),
        metavar="FILE",
        help="draw the curve (plan.png); ends in .png, .svg or .pdf",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures")
    return parser


def refuse_impossible(options: argparse.Namespace) -> None:
    """UserError for a number that cannot be, a file that cannot be written or a second corpus, naming the flag."""
    for name, value in vars(options).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, (int, float)) and not SMALLEST <= value <= LARGEST:  # NaN too
            raise UserError(f"{flag} {value}: give a number above 0, from {SMALLEST:g} to {LARGEST:g}")
        if isinstance(value, Path):
            refuse_unwritable(flag, value)
    if options.mfu is not None and options.mfu > 1:
        raise UserError(f"--mfu {options.mfu}: a share of the matrix rate; give a number up to 1")
    if options.plot is not None and options.plot.suffix not in PLOT_SUFFIXES:
        raise UserError(f"--plot {options.plot}: give a name that ends in {', '.join(PLOT_SUFFIXES)}")
    corpora = [] if options.tokens is None else [f"--tokens {options.tokens:g}"]
    corpora += [f"--shards {shards}" for shards in options.shards]
    if len(corpora) > 1:
        raise UserError(f"{' and '.join(corpora)}: only one can say how large the corpus is; remove the rest")


def refuse_unwritable(flag: str, path: Path) -> None:
    """UserError where no file can be written, before the plan is made."""
    if path.is_dir():
        raise UserError(f"{flag} {path}: a folder; give a file's name")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {path.parent}; make it, or choose another")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise UserError(f"{flag} {path}: cannot be written to; choose another place")


def machines_of(options: argparse.Namespace) -> tuple[Machines, float, list[str]]:
    """(Machines, memory of a GPU in GiB, lines that say what was assumed)."""
    from launch.planner.cost import DEFAULT_INTER_NODE_GB_PER_S, DEFAULT_MFU, Machines  # imports transformers

    gpu = find_gpu(options.gpu)
    mfu = options.mfu or DEFAULT_MFU
    intra = options.intra_node_gb_per_s or gpu.link_gb_per_s * LINK_EFFICIENCY
    inter = options.inter_node_gb_per_s or DEFAULT_INTER_NODE_GB_PER_S * LINK_EFFICIENCY
    tflops = options.matrix_rate or gpu.tflops
    machines = Machines(options.nodes, options.gpus_per_node, tflops, intra, inter, mfu)
    notes = [
        f"{options.nodes} x {options.gpus_per_node} {gpu.name}: {tflops:g} TFLOP/s dense ({gpu.source})",
        f"MFU {mfu:.0%}{'' if options.mfu else ' (assumed)'}; all-reduce {intra:g} GB/s in a node ({gpu.link}), "
        f"{inter:g} GB/s between nodes",
    ]
    return machines, options.memory_gib or gpu.memory_gib, notes


def engine_of(config: Config) -> EngineSettings:
    """The engine's settings, from the JSON that the run would use on GPUs."""
    template = read_engine_config(config.deepspeed.config or default_engine_config("cuda"))
    resolved = resolve_engine_config(
        template,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        gradient_clipping=config.training.gradient_clipping,
    )
    return engine_settings(resolved)


def check_precision(options: argparse.Namespace, precision: str) -> None:
    """UserError where the table's rate is not the rate of the run's precision."""
    gpu = find_gpu(options.gpu)
    if options.matrix_rate is None and (precision == "fp32" or (precision == "bf16" and not gpu.bf16)):
        raise UserError(
            f"deepspeed.config asks for {precision}, and the table has the fp16 rate of {gpu.name} alone: give "
            "--matrix-rate (TFLOP/s), or another deepspeed.config"
        )


def corpus_of(options: argparse.Namespace, config: Config) -> tuple[list[int], int | None, str]:
    """(tokens of every shard, vocabulary if known, a line that says where that comes from)."""
    # Both import transformers.
    from launch.planner.cost import PUBLISHED_CORPUS_TOKENS
    from train.build import load_manifest

    shards = config.data.shards
    named = bool(options.shards) or shards != DataConfig.shards
    if options.tokens is not None:
        line = f"corpus: {options.tokens / 1e9:g}e9 tokens (--tokens{f', not {shards}' if named else ''})"
        return [int(options.tokens)], None, line
    if not named and not Path(shards, MANIFEST_NAME).exists():
        words = "Wikipedia and the Book Corpus, as published; give --tokens or --shards for yours"
        line = f"corpus: {PUBLISHED_CORPUS_TOKENS / 1e9:g}e9 tokens ({words})"
        return [int(PUBLISHED_CORPUS_TOKENS)], None, line
    try:
        manifest = load_manifest(shards)
    except (UserError, FileNotFoundError) as error:
        raise UserError(f"{error}\nor plan without shards: --tokens N") from None
    tokens = [shard.tokens for shard in manifest.splits["train"]]
    line = f"corpus: {sum(tokens) / 1e9:g}e9 tokens in {len(tokens)} shards of {shards}"
    return tokens, manifest.tokenizer.vocab_size, line


if __name__ == "__main__":
    run_main(main)
