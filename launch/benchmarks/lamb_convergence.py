"""What a wrong trust ratio costs: exact LAMB and LAMB on flat partitions, at several world sizes, same everything.

    python launch/benchmarks/lamb_convergence.py --shards runs/quickstart/shards --out runs/lamb_convergence
    python launch/benchmarks/lamb_convergence.py ... --steps 300 --lr 0.01 0.0025 --world-sizes 1 4

Trains the model of a recipe (the quickstart's teacher: BERT of four layers, masked-language modelling) with
launch/pretrain.py's own loop under ZeRO-2, once with this project's Lamb and once with an ordinary LAMB, which
takes one trust ratio per flat partition. Model, data, masks, batch, schedule and seed are those of the recipe in
every run; world sizes share the machine's cores. An ordinary LAMB knows no tensors, and so can spare none adaptation
or decay: both sides adapt every tensor (adapt_all) and decay none, and differ in the extent of a ratio alone.
Leaves curves.png, table.md and figures.json in --out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

RECIPE = ROOT / "launch" / "recipes" / "quickstart-teacher.yaml"
# Both sides alike: what a LAMB on a flat partition does to all, it does to biases and norms too.
SEMANTICS = ("--optimizer.adapt_all=true", "--optimizer.weight_decay=0")
SEMANTICS_IN_WORDS = "every tensor adapted, no weight decay"
KINDS = {"exact": "exact LAMB", "flat": "LAMB on flat partitions"}


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--rank-of"]:
        return train_rank(arguments[1], arguments[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shards", type=Path, required=True, help="folder of shards, as the quickstart makes"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, curves and table")
    parser.add_argument(
        "--config", type=Path, default=RECIPE, help="recipe (default: the quickstart's teacher)"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.01], help="peak learning rates")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args(arguments)
    runs = []
    for lr in options.lr:
        for kind in KINDS:
            for world_size in options.world_sizes:
                folder = options.out / f"{kind}-{world_size}-lr{lr:g}"
                if not (folder / "summary.json").exists():
                    train(options, folder, kind, world_size, lr)
                runs.append({"kind": kind, "world_size": world_size, "lr": lr, **read_run(folder)})
    (options.out / "figures.json").write_text(json.dumps(runs, indent=1) + "\n")
    (options.out / "table.md").write_text(table(runs))
    draw(runs, options.out / "curves.png")
    print(table(runs), end="")
    return 0


def train(options: argparse.Namespace, folder: Path, kind: str, world_size: int, lr: float) -> None:
    """Start the ranks of one run and wait for them."""
    from train.distributed.rendezvous import free_port

    port = free_port()
    words = recipe_words(options, folder, lr)
    ranks = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "OMP_WAIT_POLICY": "PASSIVE",  # ranks share the cores
        }
        command = [sys.executable, str(Path(__file__).resolve()), "--rank-of", kind, *words]
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise RuntimeError(f"{folder}: ranks ended with {codes}")


def recipe_words(options: argparse.Namespace, folder: Path, lr: float) -> list[str]:
    """Arguments of launch/pretrain.py, the same for either optimizer and every world size."""
    return [
        f"--config={options.config}",
        f"--data.shards={options.shards}",
        f"--run.dir={folder}",
        f"--training.max_steps={options.steps}",
        f"--optimizer.lr={lr}",
        *SEMANTICS,
        "--training.micro_batch_size=16",
        "--run.log_every_steps=1",
        f"--evaluation.every_steps={max(1, options.steps // 10)}",
        f"--checkpoint.every_steps={options.steps}",
    ]


def train_rank(kind: str, arguments: Sequence[str]) -> int:
    """One rank of one run: launch/pretrain.py's run, the optimizer exchanged where `kind` is "flat"."""
    from launch.cli import parse_config
    from train import build as assembly
    from train.run import run

    if kind == "flat":
        assembly.start_engine = start_flat_engine
    return run(parse_config(arguments, __doc__ or ""))


def start_flat_engine(config: Any, module: Any, engine_config: dict[str, Any]) -> Any:
    """As train.build.start_engine, with an ordinary LAMB, which sees one tensor: its rank's partition."""
    import torch

    from launch.benchmarks.lamb_alternatives import LoopLamb
    from train.distributed.world import import_deepspeed

    settings = config.optimizer
    optimizer = LoopLamb(
        [p for p in module.parameters() if p.requires_grad],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    # What the log asks of an optimizer: this rank's one ratio.
    optimizer.trust_ratios, optimizer.adapted = torch.ones(1), torch.ones(1, dtype=torch.bool)  # type: ignore
    engine, *_ = import_deepspeed(config.deepspeed.log_level).initialize(
        model=module, optimizer=optimizer, config=engine_config
    )
    return engine


def read_run(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of the training loss and of the held-out MLM loss."""
    from train.loop.metrics import read_rows

    rows = read_rows(folder)

    def series(key: str) -> list[tuple[int, float]]:
        return [(row["step"], row[key]) for row in rows if key in row]

    return {"loss": series("loss"), "heldout": series("heldout_mlm_loss")}


def table(runs: list[dict[str, Any]]) -> str:
    """Held-out loss of every run at half way and at the end, as Markdown."""
    lines = [
        f"Both optimizers: {SEMANTICS_IN_WORDS}.",
        "",
        "| optimizer | ranks | peak lr | held-out loss, half way | at the end |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        heldout = dict(run["heldout"])
        last = max(heldout)
        middle = min(heldout, key=lambda step: abs(step - last // 2))
        lines.append(
            f"| {KINDS[run['kind']]} | {run['world_size']} | {run['lr']:g} | {heldout[middle]:.3f} | "
            f"{heldout[last]:.3f} |"
        )
    return "\n".join(lines) + "\n"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss over steps: one panel per learning rate, one line per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = sorted({run["lr"] for run in runs})
    figure, axes = pyplot.subplots(
        1, len(rates), figsize=(1 + 4.5 * len(rates), 4), sharey=True, squeeze=False
    )
    for axis, rate in zip(axes[0], rates, strict=True):
        for run in (run for run in runs if run["lr"] == rate):
            steps, losses = zip(*run["heldout"], strict=True)
            style = "-" if run["world_size"] == min(r["world_size"] for r in runs) else "--"
            color = "tab:blue" if run["kind"] == "exact" else "tab:red"
            label = f"{KINDS[run['kind']]}, {run['world_size']} rank{'s' * (run['world_size'] > 1)}"
            axis.plot(steps, losses, style, color=color, label=label)
        axis.set(title=f"peak learning rate {rate:g}", xlabel="step")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("held-out MLM loss (nats per masked token)")
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(f"Both optimizers: {SEMANTICS_IN_WORDS}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    from launch.cli import run_main

    run_main(main)
