"""launch/report.py: the page and its Markdown say what the inputs say, and refuse inputs that are none."""

from __future__ import annotations

import html.parser
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import launch.report
from launch.report import main
from launch.reporting import published
from launch.reporting.comparison import ComparedModel, compare
from launch.reporting.inputs import read_ablation, read_inference, read_model_scores
from launch.reporting.loss_curves import (
    COLORS,
    HELDOUT,
    TRAINING,
    Curve,
    Losses,
    panels_of,
    plot_losses,
    read_curve,
    svg_charts,
)
from launch.reporting.runs import device_of, read_run_facts
from launch.reporting.scores import own_table, retention, retention_table
from launch.reporting.tables import heldout_table, heldout_text
from train.config import Config
from train.config_sections.data import DataConfig
from train.config_sections.model import ModelConfig
from train.errors import UserError
from train.finetuning.tasks import SPLIT_OFF

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


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return finished_run(tmp_path)


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


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of all inputs; the models' scoring stands in for itself, since it needs models."""
    tmp_path = tmp_path_factory.mktemp("everything")
    model = ComparedModel("student", 66_000, 4.75, 0.25, 0.5, 0.125, 1234.4, MASKED)
    teacher = write_scores(
        tmp_path / "t",
        cola=scores("cola", 0.0),
        sst2=scores("sst2", 90.0),
        imdb=scores("imdb", 88.0),
        squad=scores("squad", 80.0, metrics={"exact_match": 70.25, "f1": 80.0}),
    )
    student = write_scores(
        tmp_path / "s",
        cola=scores("cola", 12.0),
        sst2=scores("sst2", 81.0, teacher=["big"]),
        imdb=scores("imdb", 66.0, seeds=1),
        mnli=scores("mnli", 50.0),
    )
    (tmp_path / "i.json").write_text(json.dumps(inference_json()))
    (tmp_path / "a.json").write_text(json.dumps(ablation_json()))
    words = [str(finished_run(tmp_path)), "--out", str(tmp_path / "out")]
    words += ["--scores", f"teacher={teacher}", f"{NASTY}={student}"]
    words += ["--inference", str(tmp_path / "i.json"), "--ablation", str(tmp_path / "a.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.report, "compare_runs", lambda runs: [model])
        assert main(words) == 0
    return tmp_path / "out"


def rows_of(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Table title -> first cell of the row -> the other cells, from the page."""
    page = Page((folder / "report.html").read_text())
    return {title: {row[0]: row[1:] for row in rows} for title, rows in page.tables.items()}


def test_models_without_head_have_columns_of_their_own() -> None:
    """And none that would be empty."""
    rest = (None, None, None, None, 1234.4, None)
    models = [
        ComparedModel("teacher", 110_000, *rest),
        ComparedModel("student", 66_000, *rest, relation=0.25),
    ]
    table = heldout_table(models)
    assert [column.heading for column in table.columns] == [
        "model",
        "parameters",
        "relations to teacher (nats)",
        "sentences/s (CPU, batch 32)",
    ]
    assert table.rows == [("teacher", "110,000", DASH, "1,234"), ("student", "66,000", "0.2500", "1,234")]
    assert table.title == "Held-out text, the same for every model"
    assert "0.2500" in heldout_text(models)


def test_a_run_without_mlm_losses_has_no_plot(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_folder / "metrics.jsonl").write_text('{"step": 0, "heldout_relation": 0.5}\n')
    student = ComparedModel("student", 66_000, None, None, None, None, 1234.4, None, relation=0.25)
    monkeypatch.setattr(launch.report, "compare_runs", lambda runs: [student])
    assert main([str(run_folder), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out/loss.png").exists()
    assert "loss curves" not in (tmp_path / "out/report.txt").read_text()


def test_numbers_are_the_inputs(everything: Path) -> None:
    tables = rows_of(everything)
    assert tables["Table 1. GLUE"]["CoLA"] == ["0.0 (-1.5 to 0.5)", "12.0 (10.5 to 12.5)", "56.3", "51.3"]
    assert tables["Table 1. GLUE"]["SST-2"][:2] == ["90.0 (88.5 to 90.5)", "81.0 (79.5 to 81.5)"]
    assert tables["Table 1. GLUE"]["MNLI"] == [DASH, "50.0 (48.5 to 50.5)", "84.7", "82.1"]
    assert tables["Table 1. GLUE"]["mean of the 2 that all have"] == ["45.0", "46.5", "74.5", "71.3"]
    assert tables["Table 2. IMDb and SQuAD"]["IMDb, accuracy"][:2] == ["88.0 (86.5 to 88.5)", "66.0"]
    assert tables["Table 2. IMDb and SQuAD"]["SQuAD 1.1, exact match"] == [
        "70.2 (68.8 to 70.8)",
        DASH,
        "81.2",
        "77.7",
        "79.1",
    ]
    assert tables["Table 3. Size and speed"]["size on disk, fp32 (MB)"] == ["8.0", "4.0", DASH, DASH]
    assert tables["Table 3. Size and speed"]["1,500 pairs as long as STS-B's, batch 1 (s)"] == [
        "15.0",
        "6.0",
        "668",
        "410",
    ]
    assert tables["Table 3. Size and speed"]["times faster than teacher (BERT-base)"][1::2] == [
        "2.51 (2.35-2.60)",
        "1.63",
    ]
    assert tables["Latency and throughput"]["8 x 128, eager"] == ["80", "12.5", "50", "20", DASH]
    assert tables["Latency and throughput"]["1 x STS-B, eager"] == [
        *("10", "100", "4 (3.9-4.25)", "250", "2.51 (2.35-2.60)")
    ]
    assert tables["Table 4. Ablation"]["no-kd"] == [
        "a=<b>",
        "0.7500 (+0.2500)",
        "50.0 (+0.3 ~)",
        "66.5 (-3.5)",
        "-2.96",
    ]
    # 40 s for the first 4,000 tokens and 20 s for the others, on 64 / (16 x 2) processes
    assert tables["Cost"]["student"] == ["adamw", "20", "8,000", "60", "133", "2", "CPU", "0.0333"]
    assert tables[f"Held-out masked tokens, the same for every model: {MASKED}"]["student"][:3] == [
        "66,000",
        "4.750",
        "115.6",
    ]


def test_retention(everything: Path) -> None:
    rows = rows_of(everything)["Retention"]
    assert rows["CoLA"] == [DASH, "91.1%"]  # the teacher scores 0
    assert rows["SST-2"] == ["90.0%", "98.5%"]
    assert rows["IMDb"] == ["75.0%", "99.3%"]
    assert rows["means of 2 GLUE tasks"] == ["103.3%", "95.7%"]
    assert not {"SQuAD 1.1", "MNLI"} & set(rows)  # one of the two was not scored
    assert (retention(45.0, 90.0), retention(1.0, 0.0), retention(1.0, -2.0)) == ("50.0%", DASH, DASH)


def test_page_and_markdown_agree(everything: Path) -> None:
    page = Page((everything / "report.html").read_text())
    in_markdown = markdown_tables((everything / "report.md").read_text())
    assert list(page.tables) == list(in_markdown)
    for title, rows in page.tables.items():
        assert [[" ".join(cell.split()) for cell in row] for row in rows[-len(in_markdown[title]) :]] == (
            in_markdown[title]
        )


def test_page_stands_alone_and_is_escaped(everything: Path) -> None:
    text = (everything / "report.html").read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if {"src", "href", "onload"} & set(attrs)]
    assert all(attrs.get("xlink:href", "#").startswith("#") for tag, attrs in page.tags)
    assert "url(" not in text.replace("url(#", "")
    assert "@import" not in text
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;|*x*" in text
    markdown = (everything / "report.md").read_text()
    assert "<script" not in markdown
    assert r"&lt;script&gt;alert(1)&lt;/script&gt;\|\*x\*" in markdown


def test_tables_are_accessible(everything: Path) -> None:
    page = Page((everything / "report.html").read_text())
    assert all(attrs.get("scope") in ("col", "row", "colgroup") for tag, attrs in page.tags if tag == "th")
    assert [tag for tag, _ in page.tags].count("caption") == [tag for tag, _ in page.tags].count("table") == 8
    charts = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    assert len(charts) == 2
    assert all("lines: student" in str(attrs["aria-label"]) for attrs in charts)


def test_published_figures_stand_apart_and_the_scale_comes_first(everything: Path) -> None:
    text = (everything / "report.html").read_text()
    scale = text.index(
        "SMALL SCALE, not the paper&#39;s. student has 66,000 parameters (its teacher 110,000)"
    )
    assert scale < text.index("<table>")
    assert "trained on 8,000 tokens by 2 processes on CPU" in text
    assert text.count(f'class="published">{published.LABEL}</th>') == 5
    cells = re.findall(r'<td class="published( first)?">([^<]*)</td>', text)
    assert {value for _, value in cells} >= {"56.3", "51.3", "93.46", "668", "-2.96", "98.5%"}
    ours = re.findall(r'<td class="(?: ?first)?">([^<]*)</td>', text)
    assert not {"56.3", "93.46", "668", "-2.96"} & set(ours)


def test_notes_tell_what_cannot_be_compared(everything: Path, tmp_path: Path) -> None:
    text = (everything / "report.md").read_text()
    assert "with a fine-tuned teacher's soft labels on SST-2" in text
    assert "median of 1 to 3 seeds" in text
    one = write_scores(tmp_path / "one", rte=scores("rte", 60.0))
    two = write_scores(tmp_path / "two", rte=scores("rte", 50.0, dev_examples={"dev": 49}))
    main(["--out", str(tmp_path / "o2"), "--scores", f"a={one}", f"b={two}", "--reference", "b"])
    text = (tmp_path / "o2" / "report.md").read_text()
    assert (
        text.count("RTE: the models had different dev examples; not to be compared.") == 2
    )  # GLUE, retention
    assert "| mean" not in text  # of one task
    assert "| RTE | 120.0% | 86.4% |" in text


def test_what_was_not_given_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_scores(tmp_path / "s", sst2=scores("sst2", 90.0))
    main(["--out", str(tmp_path / "out"), "--scores", f"student={folder}"])
    assert list(rows_of(tmp_path / "out")) == ["Table 1. GLUE"]
    text = (tmp_path / "out" / "report.html").read_text()
    for command in ("launch/pretrain.py", "launch/ablate.py", "benchmark.py inference", "--task imdb squad"):
        assert command in text
    assert "SMALL SCALE, not the paper&#39;s. student has 1,234,567 parameters" in text
    assert not (tmp_path / "out" / "loss.png").exists()
    assert capsys.readouterr().out == f"page:        {tmp_path / 'out' / 'report.html'}\n"


def test_a_large_model_is_not_called_small(tmp_path: Path) -> None:
    folder = write_scores(tmp_path / "s", sst2=scores("sst2", 90.0, parameters=66_955_010))
    main(["--out", str(tmp_path / "out"), "--scores", f"student={folder}"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "SMALL SCALE" not in text
    assert "student has 66,955,010 parameters" in text


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda given: given.pop(key)


BROKEN_SCORES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (
        lambda given: given.update(task="rte"),
        r"sst2/scores.json: these are scores of rte, in a folder of sst2",
    ),
    (lambda given: given.update(task="sst9"), r"sst2/scores.json: there is no task 'sst9'"),
    (
        lambda given: given["median"].update(score=float("nan")),
        r"scores.json: median.score is nan, no number",
    ),
    (lambda given: given["median"].update(score=None), r"scores.json: median.score is None, no number"),
    (lambda given: given["median"].pop("score"), r'scores.json: "median" holds no "score"'),
    (without("median"), r"scores.json: lacks 'median'"),
    (without("parameters"), r"scores.json: lacks 'parameters'"),
    (lambda given: given.update(spread=[1, 2]), r"scores.json: is not such a file"),
]


@pytest.mark.parametrize(("spoil", "message"), BROKEN_SCORES)
def test_broken_scores_are_named(
    spoil: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    content = scores("sst2", 90.0)
    spoil(content)
    write_scores(tmp_path, sst2=content)
    with pytest.raises(UserError, match=message):
        read_model_scores("m", tmp_path)


def test_files_that_are_cut_off_or_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing holds no TASK/scores.json .*launch/finetune.py"):
        read_model_scores("m", tmp_path / "nothing")
    write_scores(tmp_path, sst2=scores("sst2", 1.0))
    (tmp_path / "sst2" / "scores.json").write_text('{"task": "ss')
    with pytest.raises(UserError, match=r"sst2/scores.json: is not such a file"):
        read_model_scores("m", tmp_path)
    with pytest.raises(UserError, match=r"there is no file .*none.json"):
        read_ablation(tmp_path / "none.json")
    (tmp_path / "a.json").write_text(json.dumps({"variants": []}))
    with pytest.raises(UserError, match=r"a.json: holds no variants"):
        read_ablation(tmp_path / "a.json")
    broken = ablation_json()
    broken["variants"][1]["heldout"]["heldout_kl"] = float("inf")
    (tmp_path / "a.json").write_text(json.dumps(broken))
    with pytest.raises(UserError, match=r"a.json: variants.1.heldout.heldout_kl is inf, no number"):
        read_ablation(tmp_path / "a.json")
    speeds = inference_json()
    speeds["models"][1]["name"] = "teacher"
    (tmp_path / "i.json").write_text(json.dumps(speeds))
    with pytest.raises(UserError, match=r"i.json: its models are named \['teacher', 'teacher'\]"):
        read_inference(tmp_path / "i.json")
    speeds["models"][0]["rows"][0]["latency_ms"] = "fast"
    (tmp_path / "i.json").write_text(json.dumps(speeds))
    with pytest.raises(UserError, match=r"i.json: models.0.rows.0.latency_ms is 'fast', no number"):
        read_inference(tmp_path / "i.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to report: give run folders, --scores, --inference, --ablation or --study"),
        (["--scores", "a={s}", "a={s}"], "there is a model 'a' already; each needs a name of its own"),
        (["--scores", "{s}"], "give NAME=DIR"),
        (["--scores", "a={s}", "--reference", "b"], "--reference b: --scores has a"),
        (["--ablation", "x", "--reference", "b"], "--reference b names a model of --scores"),
        (["--scores", "a={s}", "--curves", "x"], "--curves adds to the plot of runs"),
        (["{r}", "{r}"], "two runs are named 'student'"),
        (["nowhere"], "nowhere is not a run folder: it holds no metrics.jsonl"),
    ],
)
def test_bad_usage_is_named(words: list[str], message: str, tmp_path: Path, run_folder: Path) -> None:
    folder = write_scores(tmp_path / "s", sst2=scores("sst2", 90.0))
    given = [word.replace("{s}", str(folder)).replace("{r}", str(run_folder)) for word in words]
    with pytest.raises(UserError, match=message):
        main([*given, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_named(run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "summary.json").unlink()
    with pytest.raises(UserError, match=r"student is not finished: it holds no summary.json yet"):
        main([str(run_folder), "--out", str(tmp_path / "out")])


def test_curves_leave_out_what_is_no_number(run_folder: Path) -> None:
    heldout, training = read_curve(run_folder).losses
    assert heldout.points == [(0.0, 5.5), (8000.0, 4.75)]
    assert training.points == [(4000.0, 5.25)]
    assert heldout.teacher_loss == 4.5


def test_losses_of_other_masks_or_lengths_never_share_an_axis(run_folder: Path, tmp_path: Path) -> None:
    """A run of this version beside one of an older, whose held-out masks were those it trained with; and a run that
    went on from the older version to this one."""
    config = {"masking": {"probability": 0.15, "smoothing": 0.7, "whole_word": False}}
    config |= {
        "data": {"seed": 0, "sequence_length": 128},
        "schedule": {"short_sequence_length": None},
    }
    (run_folder / "config.yaml").write_text(json.dumps(config))
    old = read_curve(run_folder)
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "heldout_mlm_loss": 4.25, "heldout_masking": MASKED}) + "\n")
    panels = panels_of([old, read_curve(run_folder)])
    assert [(panel.title, list(panel.lines), panel.teacher_loss) for panel in panels] == [
        ("Held-out windows: 15 % of 128 tokens, by count**-0.7", [0, 1], 4.5),
        (f"Held-out windows: {MASKED}", [1], None),
        ("Training batches: 15 % of 128 tokens, by count**-0.7", [0, 1], None),
    ]
    assert panels[1].lines[1] == [(8000.0, 4.25)]
    plot_losses([old, read_curve(run_folder)], tmp_path / "loss.png")
    assert len(svg_charts([old, read_curve(run_folder)])) == 3


def test_device(run_folder: Path) -> None:
    assert read_run_facts(run_folder).device == "CPU"
    cuda = {"versions": {"torch": "2.13.0+cu130"}}
    assert device_of(cuda, {"fp16": {"enabled": True}}) == "GPU"
    assert device_of(cuda, {}) == "device not recorded"
    assert device_of({**cuda, "device": "cpu"}, {"bf16": {"enabled": True}}) == "CPU"
    assert device_of({**cuda, "device": "cuda:0"}, {}) == "GPU"


def test_a_folder_of_no_task_is_named_and_a_task_stands_there_once(tmp_path: Path) -> None:
    write_scores(tmp_path / "copy", sst2_old=scores("sst2", 1.0))
    with pytest.raises(UserError, match=r"sst2_old/scores.json: there is no task 'sst2_old'"):
        read_model_scores("m", tmp_path / "copy")
    write_scores(tmp_path, **{"sst2": scores("sst2", 1.0), "SST-2": scores("sst2", 2.0)})
    with pytest.raises(UserError, match=rf"{tmp_path} holds two folders of scores of sst2; move one away"):
        read_model_scores("m", tmp_path)


def test_one_teacher_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In loss.png and in the page: that of the first run that has a teacher, whose students the table compares."""
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(
        Axes, "axhline", lambda axes, level, **style: drawn.append(level) or axes.plot([], **style)[0]
    )
    points = [(1.0, 3.0)]
    curves = [
        Curve(str(loss), [Losses(HELDOUT, "", points, loss), Losses(TRAINING, "", points)])
        for loss in (None, 1.5, 2.5)
    ]
    plot_losses(curves, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    svg_charts(curves)
    assert drawn == [1.5, 1.5]
    assert panels_of(curves[:1])[0].teacher_loss is None


def test_charts_are_the_same_each_time_and_take_the_page_s_colours() -> None:
    """The names of runs are text, whatever matplotlib or HTML would see in them."""
    names = ["_hidden", "$x^2$", NASTY]
    curves = [Curve(name, [Losses(HELDOUT, "", [(1.0, 3.0), (2.0, 2.0)])]) for name in names]
    (chart,) = svg_charts(curves)  # no training losses: no second chart
    assert svg_charts(curves) == [chart]
    assert [plain(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", chart)][-3:] == names
    assert not re.search('#[0-9a-f]{6}[;"]', chart)
    assert (
        {f"var(--{color})" for color in COLORS}
        >= set(re.findall(r"var\([^)]*\)", chart))
        >= {f"var(--c{number})" for number in range(3)}
    )


def notes_of(tmp_path: Path, *models: dict[str, dict[str, Any]]) -> str:
    """What stands below the tables of scores."""
    words = []
    for index, by_task in enumerate(models):
        words += ["--scores", f"m{index}={write_scores(tmp_path / str(index), **by_task)}"]
    assert main(["--out", str(tmp_path / "out"), *words]) == 0
    return plain((tmp_path / "out" / "report.md").read_text())


def test_how_much_of_a_task_was_scored_is_told(tmp_path: Path) -> None:
    part, whole = {"max_train_examples": 100}, {"max_train_examples": 101, "max_eval_examples": 51}
    both = {"matched": 30, "mismatched": 20}
    said = notes_of(
        tmp_path,
        {
            "mnli": scores("mnli", 40.0, dev_examples=both, settings=whole),
            "rte": scores("rte", 50.0, settings=part),
            "imdb": scores("imdb", 60.0, dev_examples={SPLIT_OFF: 10}),
        },
    )
    assert "training and dev: MNLI 100 and 50; RTE 100 and 50, a part." in said
    assert "mean of both dev sets for MNLI, else accuracy" in said
    assert "training and dev: IMDb 100 and 10." in said
    assert "IMDb of m0: scored on a part of the training set" in said


def test_each_model_s_examples_are_told(tmp_path: Path) -> None:
    whole = scores("imdb", 80.0, train_examples=25_000, dev_examples={"dev": 25_000})
    part = scores("imdb", 60.0, dev_examples={SPLIT_OFF: 10}, settings={"max_train_examples": 100})
    said = notes_of(tmp_path, {"imdb": whole}, {"imdb": part})
    assert "training and dev: IMDb 25,000 and 25,000 (m0) or 100 and 10, a part (m1)." in said
    assert "IMDb of m1: scored on a part of the training set" in said
    assert "different settings" not in said


@pytest.mark.parametrize(
    ("dev", "expected"),
    [({"matched": 50}, "the matched dev set alone for MNLI"), (None, "STS-B, else accuracy")],
)
def test_what_is_said_of_mnli(dev: dict[str, int] | None, expected: str, tmp_path: Path) -> None:
    given = {"rte": scores("rte", 50.0)}
    if dev is not None:
        given["mnli"] = scores("mnli", 40.0, dev_examples=dev)
    assert expected in notes_of(tmp_path, given)


def test_models_fine_tuned_differently_are_told(tmp_path: Path) -> None:
    """A teacher's soft labels aside, whose settings the others cannot have."""
    slow = scores("rte", 50.0, settings={"learning_rate": 2e-5, "max_length": 128})
    fast = scores("rte", 52.0, settings={"learning_rate": 5e-4, "max_length": 64, "temperature": 2.0})
    said = notes_of(tmp_path, {"rte": slow}, {"rte": fast})
    assert "RTE: the models were fine-tuned with different settings (learning_rate, max_length)." in said
    taught = scores("rte", 52.0, settings={"learning_rate": 2e-5, "max_length": 128, "temperature": 2.0})
    assert "different settings" not in notes_of(tmp_path / "same", {"rte": slow}, {"rte": taught})


def test_the_folder_of_one_task_is_named(tmp_path: Path) -> None:
    folder = write_scores(tmp_path / "scores", rte=scores("rte", 60.0))
    with pytest.raises(
        ValueError, match=rf"that is the folder of one task; give the one that holds it, {folder}"
    ):
        main(["--out", str(tmp_path / "out"), "--scores", f"a={folder / 'rte'}"])


def test_shards_that_count_from_another_folder_are_named(tmp_path: Path, teacher_folder: str) -> None:
    config = Config(data=DataConfig(shards="no/shards"), model=ModelConfig(teacher=teacher_folder))
    with pytest.raises(UserError, match=r"mine/config.yaml names data.shards='no/shards', which is not here"):
        compare([tmp_path / "mine"], [config])


def test_tasks_of_ones_own_have_a_table(tmp_path: Path) -> None:
    own = {"format": "csv", "labels": ["a", "b"]}
    more = {"own": own, "metrics": {"macro_f1": 71.5}}
    one = write_scores(tmp_path / "one", news=scores("news", 80.0, **more), rte=scores("rte", 60.0))
    two = write_scores(tmp_path / "two", news=scores("news", 60.0, **more))
    models = [read_model_scores("teacher", one), read_model_scores("student", two)]
    table = own_table(models)
    assert table is not None
    assert [row[0] for row in table.rows] == ["news, accuracy", "news, macro f1"]
    assert table.rows[0][1:] == ["80.0 (78.5 to 80.5)", "60.0 (58.5 to 60.5)"]
    kept = retention_table(models, "teacher")
    assert kept is not None
    assert kept.rows[0][:2] == ["news", "75.0%"]
    with pytest.raises(UserError, match="there is no task 'news'"):
        read_model_scores("x", write_scores(tmp_path / "x", news=scores("news", 80.0)))
