"""What a report is made of: scores, speeds, an ablation, a run; and how its page and Markdown are read."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

NASTY = "<script>alert(1)</script>|*x*"
MASKED = "15 % of 64 tokens, uniform"
DASH = "–"  # noqa: RUF001


class Page(html.parser.HTMLParser):
    """Tables of a page: caption -> rows of cell texts; every tag and attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._cell: list[str] | None = None
        self._rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th", "caption"):
            self._cell = []

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption":
            self.tables["".join(self._cell or []).strip()] = self._rows
        elif tag in ("td", "th"):
            self._rows[-1].append("".join(self._cell or []))
        if tag in ("td", "th", "caption"):
            self._cell = None


def markdown_tables(text: str) -> dict[str, list[list[str]]]:
    """Heading -> body rows of the table below it, unescaped."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith("## "):
            title = plain(line[3:])
        elif line.startswith("| "):
            found.setdefault(title, []).append([plain(cell) for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return {title: rows[1:] for title, rows in found.items()}


def plain(text: str) -> str:
    return html.unescape(re.sub(r"\\(.)", r"\1", text)).strip()


def scores(task: str, score: float, seeds: int = 3, **more: Any) -> dict[str, Any]:
    metrics = {"accuracy": score, "score": score, **more.pop("metrics", {})}
    return {
        "task": task,
        "model": "m",
        "teacher": [],
        "unlabelled": None,
        "parameters": 1_234_567,
        "settings": {},
        "train_examples": 100,
        "dev_examples": {"dev": 50},
        "metrics": ["accuracy"],
        "seeds": {str(seed): metrics for seed in range(seeds)},
        "median": metrics,
        "spread": {name: [value - 1.5, value + 0.5] for name, value in metrics.items()},
        "versions": {},
        **more,
    }


def write_scores(folder: Path, **by_task: dict[str, Any]) -> Path:
    for task, content in by_task.items():
        (folder / task).mkdir(parents=True)
        (folder / task / "scores.json").write_text(json.dumps(content))
    return folder


def speed_row(latency: float, **more: Any) -> dict[str, Any]:
    row = {"workload": "STS-B", "runtime": "eager", "device": "cpu", "batch": 1, "sequence_length": 31.35}
    return {**row, "latency_ms": latency, "sentences_per_s": 1000 / latency, **more}


def inference_json() -> dict[str, Any]:
    def model(name: str, parameters: int, *latencies: float) -> dict[str, Any]:
        rows = [speed_row(latencies[0]), speed_row(latencies[1], workload="", sequence_length=128, batch=8)]
        return {"name": name, "parameters": parameters, "bytes": 4 * parameters, "rows": rows}

    ratio = {"model": NASTY, "workload": "STS-B", "runtime": "eager", "batch": 1, "sequence_length": 31.35}
    models = [model("teacher", 2_000_000, 10.0, 80.0), model(NASTY, 1_000_000, 4.0, 50.0)]
    models[1]["rows"][0]["latency_ms_range"] = [3.9, 4.25]  # the others are of an older version
    ratio |= {"times_faster": 2.51, "times_faster_range": [2.35, 2.6]}
    return {"hardware": "a CPU", "threads": 2, "models": models, "ratios": [ratio]}


def ablation_json() -> dict[str, Any]:
    def variant(name: str, kl: float, glue: float, difference: dict[str, float]) -> dict[str, Any]:
        heldout = {"heldout_kl": kl, "heldout_top1_agreement": 0.5}
        return {"name": name, "changed": "a=<b>", "heldout": heldout, "difference": difference, "glue": glue}

    change = {"heldout_kl": 0.25, "heldout_top1_agreement": 0.3}
    variants = [variant("full", 0.5, 70.0, {}), variant("no-kd", 0.75, 66.5, change)]
    return {"variants": variants, "noise": {"heldout_kl": 0.01, "heldout_top1_agreement": 0.5}}


def finished_run(parent: Path) -> Path:
    """The text files of a run of two processes."""
    folder = parent / "runs" / "student"
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {"step": 0, "heldout_mlm_loss": 5.5, "teacher_heldout_mlm_loss": 4.5},
        {"step": 10, "tokens": 4000, "tokens_per_s": 100.0, "loss_mlm": 5.25},
        {"step": 20, "tokens": 8000, "tokens_per_s": 200.0, "loss_mlm": float("nan")},
        {"step": 20, "heldout_mlm_loss": 4.75},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"steps": 20, "tokens": 8000, "parameters": {"student": 66_000, "teacher": 110_000}}
    (folder / "summary.json").write_text(json.dumps({**summary, "versions": {"torch": "2.13.0+cpu"}}))
    engine = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 2}
    (folder / "ds_config.json").write_text(json.dumps(engine))
    (folder / "config.yaml").write_text("optimizer: {name: adamw, lr: 0.001}\n")
    return folder


def rows_of(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Table title -> first cell of the row -> the other cells, from the page."""
    page = Page((folder / "report.html").read_text())
    return {title: {row[0]: row[1:] for row in rows} for title, rows in page.tables.items()}
