"""How much faster is the student? Forward passes of several models, side by side in one run.

    python launch/benchmark.py inference                     BERT-base and DistilBERT-base, random weights, no download
    python launch/benchmark.py inference --model teacher=DIR --model student=DIR --json FILE

The first model is the reference: the others are so many times faster than it. Each runs in plain torch (eager), under
torch.compile, and in ONNX Runtime in fp32 and with int8 weights (launch/export.py --onnx --int8 writes such files).
All take turns within each round; medians over the rounds, with the fastest and the slowest.

Two kinds of work: batch 1 over sentence pairs as long as those of STS-B's dev set, which is table 3 of the DistilBERT
paper; and batches of 1, 8 and 32 sequences of equal length. Models are measured with the head of a classifier: a
masked-language-modelling head is replaced by one output, others stay. Report: launch/report.py --inference FILE.

--device cuda measures torch alone, in fp16, and has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data_prep.shard_format.files import write_json
from data_prep.shard_format.terminal import progress_bar
from launch.benchmarks import options
from launch.benchmarks.inference_models import (
    MAX_TEXTS,
    Contender,
    Inputs,
    Workload,
    load_contenders,
    make_workloads,
    numbers,
    prepare,
)
from launch.common.machine import hardware
from launch.common.tables import text_table
from launch.reporting import published
from train.distributed.world import quiet_libraries
from train.errors import UserError, one_line
from train.export.onnx_check import require_onnx
from train.run_folder import provenance

RUNTIMES = ("eager", "compile", "onnx", "onnx-int8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a Hugging Face folder; repeat it, reference first",
    )
    parser.add_argument("--runtimes", default=None, help=f"with commas (default {','.join(RUNTIMES)})")
    parser.add_argument("--batch-sizes", default="1,8,32", help="with commas (default 1,8,32)")
    parser.add_argument("--lengths", default="128", help="tokens of a sequence, with commas (default 128)")
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help=f"a sentence per line, or a pair with a tab between, in place of STS-B's lengths; {MAX_TEXTS} are taken",
    )
    parser.add_argument(
        "--rounds",
        type=options.at_least_1,
        default=4,
        help="at batch 1; larger batches half of it (default 4)",
    )
    parser.add_argument("--threads", type=options.at_least_1, default=None, help="default: torch's own")
    parser.add_argument("--device", type=options.device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--json", type=options.new_file, metavar="FILE", help="also write the figures here")


def main(args: argparse.Namespace) -> int:
    quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    runtimes = chosen_runtimes(args.runtimes, args.device)
    contenders = load_contenders(args.model)
    batch_sizes, lengths = numbers("--batch-sizes", args.batch_sizes), numbers("--lengths", args.lengths)
    workloads = make_workloads(contenders, batch_sizes, lengths, args.texts)
    with tempfile.TemporaryDirectory() as folder:
        for contender in contenders:
            prepare(contender, runtimes, args.device, Path(folder))
        left_out: dict[str, str] = {}
        times = measure(contenders, workloads, args.rounds, args.device, left_out)
    report = summarise(contenders, workloads, times, args)
    report["left_out"] = left_out
    print_tables(report)
    if args.json:
        write_json(args.json, report)
    return 0


def chosen_runtimes(words: str | None, device: str) -> list[str]:
    """The runtimes to measure; UserError for unknown ones, or without the packages that they need."""
    chosen = (words or ",".join(RUNTIMES if device == "cpu" else RUNTIMES[:2])).split(",")
    for name in chosen:
        if name not in RUNTIMES:
            raise UserError(f"--runtimes {name}: there are {', '.join(RUNTIMES)}")
        if name.startswith("onnx") and device == "cuda":
            raise UserError(f"--runtimes {name}: ONNX Runtime is measured on the CPU alone")
    if any(name.startswith("onnx") for name in chosen):
        require_onnx()
    return list(dict.fromkeys(chosen))


Times = dict[tuple[int, str, str], list[float]]
"""(workload, runtime, model) -> seconds of a batch in each round."""


def measure(
    contenders: Sequence[Contender],
    workloads: Sequence[Workload],
    rounds: int,
    device: str,
    left_out: dict[str, str],
) -> Times:
    """Time every model in every runtime on every workload, in turns; one round before is not counted.

    Args:
        left_out: takes {runtime: reason} for a runtime that does not work here (torch.compile without a compiler).
    """
    times: Times = {}
    runtimes = list(contenders[0].runs)
    bar = progress_bar(total=len(workloads), unit="workload", desc="measuring", leave=False)
    for number, workload in enumerate(workloads):
        on_device = {
            name: [{key: tensor.to(device) for key, tensor in one.items()} for one in batches]
            for name, batches in workload.batches.items()
        }
        for round_number in range((rounds if workload.batch == 1 else max(2, rounds // 2)) + 1):
            for runtime in runtimes:
                for contender in contenders if runtime not in left_out else ():
                    try:
                        spent = _seconds(contender.runs[runtime], on_device[contender.name], device)
                    except Exception as error:
                        if runtime != "compile" or round_number:
                            raise
                        left_out[runtime] = one_line(error, 200)
                        break
                    if round_number:
                        times.setdefault((number, runtime, contender.name), []).append(spent)
        bar.update()
    bar.close()
    return times


def _seconds(run: Callable[[Inputs], Any], batches: Sequence[Inputs], device: str) -> float:
    """Mean seconds of a batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile has remarks on its first call
        start = time.perf_counter()
        for inputs in batches:
            run(inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / len(batches)


def summarise(
    contenders: Sequence[Contender], workloads: Sequence[Workload], times: Times, args: argparse.Namespace
) -> dict[str, Any]:
    """The figures as --json writes them."""
    models = []
    for contender in contenders:
        rows = []
        for (number, runtime, name), seconds in times.items():
            if name != contender.name:
                continue
            workload, median = workloads[number], statistics.median(seconds)
            rows.append(
                {
                    "workload": workload.name,
                    "runtime": runtime,
                    "device": args.device,
                    "batch": workload.batch,
                    "sequence_length": workload.sequence_length,
                    "latency_ms": median * 1e3,
                    "latency_ms_range": [min(seconds) * 1e3, max(seconds) * 1e3],
                    "sentences_per_s": workload.batch / median,
                    "rounds": len(seconds),
                }
            )
        models.append(
            {
                "name": contender.name,
                "source": contender.source,
                "head": contender.head,
                "parameters": contender.parameters,
                "bytes": contender.sizes["eager"],
                "bytes_by_runtime": contender.sizes,
                "rows": rows,
            }
        )
    return {
        "hardware": hardware(args.device),
        "threads": torch.get_num_threads(),
        "reference": models[0]["name"],
        "models": models,
        "ratios": ratios(contenders, workloads, times),
        "published": {
            "label": f"{published.LABEL}: {published.SOURCE}, table 3",
            "pairs": published.STSB_PAIRS,
            "pass_s": published.PASS_SECONDS,
        },
        "versions": provenance(),
    }


def ratios(
    contenders: Sequence[Contender], workloads: Sequence[Workload], times: Times
) -> list[dict[str, Any]]:
    """How many times faster than the first model each other one is: the median over the rounds, in which both took
    their turn under the same load."""
    reference = contenders[0].name
    found = []
    for (number, runtime, name), seconds in times.items():
        if name == reference:
            continue
        pairs = zip(times[number, runtime, reference], seconds, strict=True)
        faster = [first / own for first, own in pairs]
        workload = workloads[number]
        found.append(
            {
                "model": name,
                "workload": workload.name,
                "runtime": runtime,
                "batch": workload.batch,
                "sequence_length": workload.sequence_length,
                "times_faster": statistics.median(faster),
                "times_faster_range": [min(faster), max(faster)],
            }
        )
    return found


def print_tables(report: Mapping[str, Any]) -> None:
    models = report["models"]
    print(f"{report['hardware']}; {report['threads']} threads; torch {report['versions']['torch']}")
    sizes = [
        [
            model["name"],
            f"{model['parameters']:,}",
            *(
                f"{model['bytes_by_runtime'][key] / 1e6:,.1f}" if key in model["bytes_by_runtime"] else ""
                for key in ("eager", "onnx", "onnx-int8")
            ),
            f"{model['source']}; {model['head']}",
        ]
        for model in models
    ]
    columns = ["model", "parameters", "safetensors\nMB", "ONNX\nMB", "ONNX int8\nMB", "weights; head"]
    print(text_table(columns, sizes))
    headings = ["batch", "tokens", "runtime"]
    for model in models:
        headings += [f"{model['name']}\nms (range)", "per s"]
    headings += [f"{model['name']}\ntimes faster (range)" for model in models[1:]]
    rows = []
    for number, row in enumerate(models[0]["rows"]):
        cells = [str(row["batch"]), row["workload"] or str(round(row["sequence_length"])), row["runtime"]]
        for model in models:
            own = model["rows"][number]
            low, high = map(_short, own["latency_ms_range"])
            cells += [f"{_short(own['latency_ms'])} ({low}-{high})", _short(own["sentences_per_s"])]
        kind = ("workload", "runtime", "batch", "sequence_length")
        cells += [
            f"{ratio['times_faster']:.2f} ({'-'.join(f'{end:.2f}' for end in ratio['times_faster_range'])})"
            for ratio in report["ratios"]
            if all(ratio[key] == row[key] for key in kind)
        ]
        rows.append(cells)
    print(text_table(headings, rows))
    for runtime, reason in report["left_out"].items():
        print(f"{runtime} is left out: {reason}")
    teacher, student = report["published"]["pass_s"].values()
    print(
        f"{report['published']['label']}: {report['published']['pairs']:,} pairs of STS-B's dev set, batch 1: "
        f"{teacher:.0f} s and {student:.0f} s, {teacher / student:.2f} times faster"
    )
    pass_ms = [
        row["latency_ms"]
        for model in models
        for row in model["rows"]
        if (row["workload"], row["runtime"]) == ("STS-B", "eager")
    ]
    if pass_ms:
        listed = ", ".join(
            f"{model['name']} {ms / 1e3 * published.STSB_PAIRS:.1f} s"
            for model, ms in zip(models, pass_ms, strict=True)
        )
        print(f"here, as many pairs of those lengths in plain torch: {listed}")


def _short(value: float) -> str:
    """Three digits at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
