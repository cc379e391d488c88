"""What a run leaves, read by the next start of it and by the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from launch.common.cli import parse_config
from launch.reporting.inputs import read_ablation, read_inference
from launch.reporting.loss_curves import read_curve
from launch.reporting.page import Report, as_html, as_markdown
from launch.reporting.runs import read_run_facts
from tests.fuzzing.settings_files import SECTIONS
from tests.fuzzing.target import Target, anything
from train.config import Config
from train.loop.divergence import Rollback, read_rollbacks, write_rollbacks
from train.loop.metrics import RunEvents, read_rows
from train.run_folder import changed_config, changed_inputs, found_before, read_summary, write_configs

RUN = "run-1"
INPUTS = {
    "data.shards": "ab" * 32,
    "deepspeed.config": {"zero_optimization": {"stage": 2}, "fp16": {"enabled": False}},
}
ENGINE = {
    "train_batch_size": 64, "train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 2}, "fp16": {"enabled": False},
}  # fmt: skip
HELDOUT = {"heldout_mlm_loss": 3.5, "heldout_kl": 0.5, "heldout_top1_agreement": 0.5, "heldout_accuracy": 0.4}


def _make_run(folder: Path) -> None:
    run = folder / RUN
    write_configs(run, Config(), ENGINE, INPUTS)
    rows: list[dict[str, Any]] = [{"step": 0, **HELDOUT, "teacher_heldout_mlm_loss": 2.0}]
    for step in range(4, 25, 4):
        rows.append({
            "step": step, "epoch": 0.1 * step, "tokens": 2048 * step, "loss": 9 - step / 10, "loss_kd": 1.0,
            "loss_mlm": 5 - step / 10, "loss_cos": 0.5, "lr": 0.001, "tokens_per_s": 4000.0 + step, "mfu": 0.1,
        })  # fmt: skip
        rows += [{"step": step, **HELDOUT}] if step % 8 == 0 else []
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "spikes.jsonl").write_text(json.dumps({"step": 8, "loss": 30.0, "sequences": ["a", "b"]}) + "\n")
    write_rollbacks(run, [Rollback(12, 8, (9, 10), "the loss is nan"), Rollback(20, 16, (17,), "again")])
    summary = {
        "steps": 24, "tokens": 49152, "loss": 6.6, "tokens_per_s": 4008.0,
        "parameters": {"student": 1000, "teacher": 2000}, "device": "cpu", "model_flops_per_token": 1e6,
        "matrix_flops_per_s_of_a_rank": 1e9, "heldout_before": HELDOUT, "heldout": HELDOUT, "teacher": "t",
        "versions": {"python": "3.11", "torch": "2.13.0+cpu", "commit": "unknown"},
    }  # fmt: skip
    (run / "summary.json").write_text(json.dumps(summary, indent=2))


def _resume(folder: Path) -> Any:
    """What a start in this folder learns, and what it leaves of the rows."""
    run = folder / RUN
    config = Config()
    found_before(run, config)
    changes = [*changed_config(run, config), *changed_inputs(run, INPUTS)]
    summary = read_summary(run)
    RunEvents(run, RUN, 16, 24).close()
    return changes, summary, read_rows(run), read_rollbacks(run)


def _changes_are_told(value: Any, expected: Any, folder: Path) -> str | None:
    rows = value[2]
    if any(
        not isinstance(row, dict) or not isinstance(row.get("step"), int) or row["step"] > 16 for row in rows
    ):
        return f"rows that are none: {rows}"
    left_out = [step for each in value[3] for step in each.left_out]
    return None if all(0 <= step <= 24 for step in left_out) else f"steps that are none: {left_out}"


def _report(folder: Path) -> Any:
    run = folder / RUN
    parse_config(["--config", str(run / "config.yaml")], "")
    facts, curve = read_run_facts(run), read_curve(run)
    report = Report({"python": "3"}, runs=[facts])  # drawing would take most of the time
    return facts, curve, len(as_html(report)), len(as_markdown(report))


def _figures_are_figures(value: Any, expected: Any, folder: Path) -> str | None:
    facts, curve, *_ = value
    numbers = [facts.steps, facts.tokens, facts.seconds, facts.student_parameters, facts.num_processes]
    points = [point for losses in curve.losses for point in losses.points]
    numbers += [number for point in points for number in point]
    wrong = [
        number for number in numbers if isinstance(number, bool) or not math.isfinite(number) or number < 0
    ]
    return f"figures that are none: {wrong}" if wrong else None


def _make_measurements(folder: Path) -> None:
    row = {
        "workload": "STS-B", "runtime": "eager", "device": "cpu", "batch": 1, "sequence_length": 31.35,
        "latency_ms": 4.0, "sentences_per_s": 250.0,
    }  # fmt: skip
    shared = ("workload", "runtime", "batch", "sequence_length")
    ratio = {"model": "student", **{key: row[key] for key in shared}}
    inference = {
        "hardware": "one CPU", "threads": 1,
        "models": [{"name": name, "parameters": 10, "bytes": 40, "rows": [row]} for name in ("teacher", "student")],
        "ratios": [{**ratio, "times_faster": 2.0}],
    }  # fmt: skip
    ablation = {
        "variants": [
            {"name": "full", "changed": "", "heldout": {"mlm_loss": 3.5, "sst2": 80.0}, "glue": 80.0},
            {"name": "no-kd", "changed": "x", "heldout": {"mlm_loss": 3.7, "sst2": 79.0}, "glue": 79.0,
             "difference": {"mlm_loss": 0.2, "sst2": -1.0}},
        ],
        "scale": {}, "noise": None, "left_out": {}, "failed": {},
    }  # fmt: skip
    (folder / "inference.json").write_text(json.dumps(inference, indent=1))
    (folder / "ablation.json").write_text(json.dumps(ablation, indent=1))


def _report_measurements(folder: Path) -> Any:
    inference, ablation = read_inference(folder / "inference.json"), read_ablation(folder / "ablation.json")
    report = Report({"python": "3"}, inference=inference, ablation=ablation)
    return len(as_html(report)), len(as_markdown(report))


TARGETS = (
    Target("run-resumed", _make_run, _resume, _changes_are_told),
    Target("run-reported", _make_run, _report, _figures_are_figures, named=SECTIONS),
    Target("measurements", _make_measurements, _report_measurements, anything),
)
