"""The first look at a GPU: is this right there, how fast is it, what does it hold, and does anything wait?

    python launch/benchmark.py gpu --out DIR

NOT YET RUN ON A GPU. It starts, one after the other, on the first GPU and without downloads: the tests of tests/gpu;
training steps of BERT-base to DistilBERT (random weights, random shards) with every objective at 128 and 512 tokens, by
launch/pretrain.py, with the largest micro batch that fits; one of them again with both models compiled; LAMB beside a
copy. About 15 minutes. DIR/gpu.json holds all figures, the machine and the versions: please open an issue of this
project with it attached. DIR/gpu.txt has the same as tables; the logs lie beside them. The tests need `make
.venv/installed-dev`; an installed package has none, and says so. Exit codes: 0 done; 1 something failed, the others'
figures are there; 2 bad usage, or no GPU.

"mfu" is against the fastest large matrix product in the same process; "planned" is launch/plan.py's, without CUDA's
context; "waits" are the host's synchronisations in a step, of three that are traced, by the profiler: with one micro
batch a step DeepSpeed makes a handful (docs/NOTES.md), and more of them grow with the accumulation.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_prep.shard_format.files import write_json
from launch.benchmarks.run_inputs import OBJECTIVES, make_inputs
from launch.common.cli import parse_config
from launch.common.machine import hardware
from launch.common.tables import DASH, text_table
from launch.plan import engine_of
from launch.planner.memory import GIB, memory_parts
from launch.planner.workload import read_recipe
from train.errors import UserError
from train.loop.metrics import read_rows
from train.run_folder import provenance, recorded_config

ROOT = Path(__file__).resolve().parents[2]
TOKENS_PER_STEP = 131_072
STEPS, ROW, TRACED = 30, 10, 3
"""Of a run; of its last row of figures, which is the one that counts; of the profiler, near the start."""
WAITING = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
LIMIT_S = 900
COLUMNS = ("micro_batch_size", "tokens_per_s", "mfu", "memory_gib", "planned_gib", "waits")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for what is found")


def main(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise UserError(
            "torch sees no GPU here (`python launch/doctor.py` says why), and this measures one; for a CPU there are "
            "the other benchmarks"
        )
    if args.out.exists():
        raise UserError(f"--out={args.out} is there already; give a new folder")
    out = args.out.absolute()  # the stages run in another folder
    out.mkdir(parents=True)
    teacher, shards = make_inputs(out / "inputs")
    figures: dict[str, Any] = {"gpu": hardware("cuda"), **provenance(), "tests": _tests(out), "runs": {}}
    for name, settings in runs(teacher, shards).items():
        print(name, flush=True)
        figures["runs"][name] = measured_run(out / name.replace(" ", "-"), settings)
    figures["lamb"] = _lamb(out)
    write_json(out / "gpu.json", figures)
    text = as_text(figures)
    (out / "gpu.txt").write_text(text + "\n")
    print(f"{text}\n\nfigures: {out / 'gpu.json'}; please open an issue of this project with it attached")
    parts = {"tests/gpu": figures["tests"], **figures["runs"], "LAMB": figures["lamb"]}
    if failed := [name for name, part in parts.items() if "error" in part]:
        print(f"FAILED: {', '.join(failed)}; see the lines above and the logs in {out}", file=sys.stderr)
    return 1 if failed else 0


def runs(teacher: Path, shards: Path) -> dict[str, list[str]]:
    """Settings of launch/pretrain.py by the runs' names."""
    found = {}
    for length in (128, 512):
        for objective, own in OBJECTIVES.items():
            found[f"{objective} {length}"] = [
                f"--model.teacher={teacher}",
                f"--data.shards={shards}",
                f"--data.sequence_length={length}",
                f"--training.global_batch_size={TOKENS_PER_STEP // length}",
                "--training.micro_batch_size=auto",
                f"--training.max_steps={STEPS}",
                f"--run.log_every_steps={ROW}",
                f"--run.profile_steps={TRACED}",
                f"--checkpoint.every_steps={STEPS}",
                *own,
            ]
    compiled = ["--model.teacher_compile=true", "--model.student_compile=true"]
    return {**found, "triple 128 compiled": [*found["triple 128"], *compiled]}


def measured_run(run_dir: Path, settings: Sequence[str]) -> dict[str, Any]:
    """The figures of one run; {"error": its last line} where it fails, which must not lose the others."""
    command = ["launch/pretrain.py", f"--run.dir={run_dir}", *settings]
    if (error := _run(command, run_dir.with_suffix(".log"))) is not None:
        return {"error": error}
    micro = int(recorded_config(run_dir)["training"]["micro_batch_size"])
    row = [row for row in read_rows(run_dir) if "tokens_per_s" in row][-1]
    kept = {
        name: row[name]
        for name in row
        if name.startswith("time_") or name in (*COLUMNS, "loss", "skipped_steps")
    }
    waits = waits_per_step(json.loads((run_dir / "profile" / "trace-rank-0.json").read_text()), TRACED)
    return {
        "micro_batch_size": micro,
        **kept,
        "planned_gib": planned_gib(settings, micro),
        "waits": sum(waits.values()),
        "waits_by_name": waits,
    }


def planned_gib(settings: Sequence[str], micro_batch_size: int) -> float:
    """What launch/plan.py expects that torch allocates."""
    config = parse_config(settings, "")
    recipe = read_recipe(config, engine_of(config), [10**9], micro_batch_size=micro_batch_size)
    accumulation = config.training.global_batch_size // micro_batch_size
    parts = memory_parts(recipe.step_on(1, micro_batch_size, accumulation))
    return sum(size for name, size in parts.items() if "assumed" not in name) / GIB


def waits_per_step(trace: dict[str, Any], steps: int) -> dict[str, float]:
    """The host's synchronisations in a Chrome trace of some steps, by name; the one that ends the trace left out."""
    names = Counter(event.get("name") for event in trace["traceEvents"] if event.get("name") in WAITING)
    if names["cudaDeviceSynchronize"]:
        names["cudaDeviceSynchronize"] -= 1
    return {name: count / steps for name, count in names.items()}


def _tests(folder: Path) -> dict[str, str]:
    """pytest's last line, how many passed, as "result", or as "error" where one failed."""
    if not (ROOT / "tests" / "gpu").is_dir():
        return {"result": "not run: they are in a checkout of the project, not in an installed package"}
    log = folder / "tests.log"
    if (error := _run(["-m", "pytest", "-q", "tests/gpu"], log)) is not None:
        return {"error": error}
    return {"result": _last_line(log)}


def _lamb(folder: Path) -> dict[str, Any]:
    figures = folder / "lamb.json"
    command = ["launch/benchmark.py", "lamb", "--device", "cuda", "--json", str(figures)]
    if (error := _run(command, folder / "lamb.log")) is not None:
        return {"error": error}
    found: dict[str, Any] = json.loads(figures.read_text())
    return found


def _run(command: Sequence[str], log: Path) -> str | None:
    """One Python process, its output in `log`; None, or the last line of what failed."""
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=LIMIT_S
            )
        except subprocess.TimeoutExpired:
            return f"not done after {LIMIT_S} s, see {log}"
    return None if done.returncode == 0 else f"exit code {done.returncode}: {_last_line(log)}"


def _last_line(log: Path) -> str:
    return "".join(log.read_text(errors="replace").strip().splitlines()[-1:])


def as_text(figures: dict[str, Any]) -> str:
    """The figures as tables."""
    rows = []
    for name, run in figures["runs"].items():
        shown = [DASH if run.get(column) is None else _number(column, run[column]) for column in COLUMNS]
        rows.append([name, *(shown if "error" not in run else [DASH] * len(COLUMNS))])
    parts = [
        text_table(("run", *COLUMNS), rows, title=f"{figures['gpu']}: training steps"),
        *(f"{name}: {run['error']}" for name, run in figures["runs"].items() if "error" in run),
        f"tests/gpu: {figures['tests'].get('error') or figures['tests']['result']}",
    ]
    lamb = figures["lamb"]
    if "error" in lamb:
        return "\n".join([*parts, f"LAMB: {lamb['error']}"])
    steps = [(row["name"], f"{row['ms']:.2f}", f"{row['share_of_copy']:.0%}") for row in lamb["rows"]]
    return "\n\n".join([*parts, text_table(("optimizer step", "ms", "of a copy's GB/s"), steps)])


def _number(column: str, value: float) -> str:
    formats = {"mfu": "{:.0%}", "tokens_per_s": "{:,.0f}", "micro_batch_size": "{}"}
    return formats.get(column, "{:.1f}").format(value)
